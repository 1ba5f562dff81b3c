"""A judge's calibration card: how it agrees with people's labels, stored beside it as JSON and Markdown.

`python -m experiments.judges` writes the cards (callbacks/judges/cards/NAME@REVISION.json); every report
prints a judge's line beneath its tables. A changed revision has no card until it is measured again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from callbacks.judges.classes import ClassAgreement
from callbacks.metrics.estimates import Estimate, rate
from callbacks.metrics.names import RULES, TRENDS

CARDS = Path(__file__).parent / "cards"
RESAMPLES, SEED = 4999, 0
NOT_CALIBRATED = "not calibrated"
HELD_OUT = "all, held out"


@dataclass(frozen=True)
class Agreement:
    """Verdicts against labels. Precision is NaN where the judge never says yes, recall without positives."""

    n: int
    positives: int
    accuracy: Estimate
    precision: Estimate
    recall: Estimate
    kappa: Estimate
    """Cohen's, with a 95 % percentile bootstrap interval; NaN where it is not defined."""


@dataclass(frozen=True)
class Card:
    """What was measured of one judge."""

    judge: str
    """`name@revision`."""
    finds: str
    """What a yes of the judge should mean, in the labels' words."""
    labels: str
    """Where the labels come from, for a line beneath a table."""
    overall: Agreement
    unseen: Agreement | None
    """On the replies that nobody looked at when the judge was made; null where that is not known."""
    models: Mapping[str, Agreement]
    """By the model whose replies were judged."""
    apart: Mapping[str, Estimate] = field(default_factory=dict)
    """Label that is neither positive nor negative -> how often the judge says yes."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File of labels -> the beginning of its SHA-256."""
    classes: Mapping[str, ClassAgreement] = field(default_factory=dict)
    """Of a judge of several classes: `all`, HELD_OUT and every model -> agreement over all of them."""


def agreement(verdicts: Sequence[bool], labels: Sequence[bool]) -> Agreement:
    """Accuracy, precision and recall with Wilson intervals, and Cohen's kappa."""
    pairs = list(zip(verdicts, labels, strict=True))
    return Agreement(
        n=len(pairs),
        positives=sum(labels),
        accuracy=rate([verdict == label for verdict, label in pairs]),
        precision=rate([label for verdict, label in pairs if verdict]),
        recall=rate([verdict for verdict, label in pairs if label]),
        kappa=kappa(verdicts, labels),
    )


def kappa(verdicts: Sequence[bool], labels: Sequence[bool]) -> Estimate:
    """Cohen's kappa (1960) = (observed - expected agreement) / (1 - expected).

    The interval is scipy's percentile bootstrap over replies; without a single disagreement it is [1, 1],
    whatever n. NaN where both are constant and alike, or n < 2.
    """
    pair = np.asarray(verdicts, dtype=float), np.asarray(labels, dtype=float)
    n = len(verdicts)
    value = float(_kappa(*pair)) if n > 1 else float("nan")
    if np.isnan(value):
        return Estimate(value, value, value, n, "mean")
    found = bootstrap(
        pair, _resampled, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=500, method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    return Estimate(value, float(found.low), float(found.high), n, "mean")


def _kappa(verdicts: NDArray[Any], labels: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    yes, positive = verdicts.mean(axis), labels.mean(axis)
    observed = (verdicts == labels).mean(axis)
    expected = yes * positive + (1 - yes) * (1 - positive)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((observed - expected) / (1 - expected))


def _resampled(verdicts: NDArray[Any], labels: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    # A resample in which all are of one class, and agree, says nothing against full agreement.
    return np.nan_to_num(_kappa(verdicts, labels, axis), nan=1.0)


def card_path(judge: str, folder: Path = CARDS) -> Path:
    """Where a judge's card is; a model's name may hold what no file's may."""
    return folder / f"{re.sub(r'[^A-Za-z0-9_.@+-]', '_', judge)}.json"


def write_card(card: Card, folder: Path = CARDS) -> Path:
    """Store the card as JSON (read by reports) and Markdown (for people)."""
    path = card_path(card.judge, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {key: value for key, value in asdict(card).items() if value or key != "classes"}
    path.write_text(json.dumps(_rounded(stored), indent=1) + "\n", encoding="utf-8")
    path.with_name(f"{path.stem}.md").write_text(document(card), encoding="utf-8")
    return path


def read_card(judge: str, folder: Path = CARDS) -> Card | None:
    """The card of `name@revision`, None where there is none. Raises: ValueError naming a damaged file."""
    path = card_path(judge, folder)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["overall"] = _agreement(found["overall"])
        found["unseen"] = _agreement(found["unseen"]) if found["unseen"] else None
        found["models"] = {model: _agreement(own) for model, own in found["models"].items()}
        found["apart"] = {label: _estimate(own) for label, own in found["apart"].items()}
        found["classes"] = {name: _classes(own) for name, own in found.get("classes", {}).items()}
        return Card(**found)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); run `python -m experiments.judges` again") from error


def line(judge: str, folder: Path = CARDS) -> str:
    """One line on a judge for beneath a table: what its card says, or that it has none."""
    name = judge.partition("@")[0]
    if name in RULES:
        return f"{judge}: {RULES[name]}"
    trend = "a target prefix alone is called a trend, not success; " if name in TRENDS else ""
    card = read_card(judge, folder)
    if card is None:
        return f"{judge}: {trend}{NOT_CALIBRATED}"
    where = f"{card.labels}, cards/{card_path(judge, folder).name}"
    if card.classes:
        of, held_out = _judged_by(card)
        said = [
            f"{name}: recall {share(of.recall[name])}, precision {share(p)}"
            for name, p in of.precision.items()
        ]
        doubt = f"; UNRELIABLE: {', '.join(of.unreliable)}" if of.unreliable else ""
        return (
            f"{judge}: {len(said)} classes, accuracy {share(of.accuracy)}, kappa {number(of.kappa)}; "
            f"{'; '.join(said)}{doubt}; n = {of.n}{held_out}, {where}"
        )
    own, held_out = (card.unseen, " held out") if card.unseen is not None else (card.overall, "")
    return (
        f"{judge}: {trend}recall {share(own.recall)}, precision {share(own.precision)}, kappa "
        f"{number(own.kappa)}, n = {own.n}{held_out}, {where}"
    )


def lines(judges: Iterable[str]) -> list[str]:
    """A line on every judge, once; a worst case joins by `or` what its attacks' judges said."""
    single = dict.fromkeys(judge for joined in judges for judge in joined.split(" or "))
    return [line(judge) for judge in single if judge]


@dataclass(frozen=True)
class Calibration:
    """How far a judge's verdicts are to be believed, beside a number of theirs."""

    text: str
    """`91 % [88, 93], n = 414 held out`, `by definition` or `not calibrated`."""
    accuracy: Estimate | None = None
    """Agreement with people's labels, on held-out replies where there are any; None without a card."""


def calibration(judge: str, folder: Path = CARDS) -> Calibration:
    """What the card of `name@revision` says in a word. Raises: ValueError naming a damaged file."""
    if judge.partition("@")[0] in RULES:
        return Calibration("by definition")
    card = read_card(judge, folder)
    if card is None:
        return Calibration(NOT_CALIBRATED)
    if card.classes:
        of, held_out = _judged_by(card)
        accuracy = of.accuracy
    else:
        accuracy = (card.unseen or card.overall).accuracy
        held_out = " held out" if card.unseen is not None else ""
    return Calibration(f"{share(accuracy)}, n = {accuracy.n}{held_out}", accuracy)


def document(card: Card) -> str:
    """The card as Markdown."""
    held_out = [(HELD_OUT, card.unseen)] if card.unseen is not None else []
    rows = [("all", card.overall), *held_out, *card.models.items()]
    head = ["replies of", "n", "positive", "accuracy", "precision", "recall", "kappa"]
    lines = [f"# {card.judge}", "", f"Finds: {card.finds}. Labels: {card.labels}.", ""]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, own in rows:
        shares = [share(value) for value in (own.accuracy, own.precision, own.recall)]
        cells = [name, str(own.n), str(own.positives), *shares, number(own.kappa)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += _class_lines(card)
    lines += [
        "",
        "95 % intervals: Wilson; of kappa, percentile bootstrap over replies. Two models' replies to one ",
    ]
    lines += ["prompt count as independent.", ""]
    lines += [f"- Left out: `{name}`, judged so {share(own)} of {own.n}" for name, own in card.apart.items()]
    lines += [f"- `{name}`, SHA-256 {digest}" for name, digest in card.files.items()]
    return "\n".join(lines) + "\n"


def _judged_by(card: Card) -> tuple[ClassAgreement, str]:
    """The agreement that counts: on held-out replies where there are any."""
    held_out = card.classes.get(HELD_OUT)
    return (held_out, " held out") if held_out is not None else (card.classes["all"], "")


def _class_lines(card: Card) -> list[str]:
    """The table of a judge of several classes, and which of them it does not see well."""
    if not card.classes:
        return []
    labels = list(card.classes["all"].precision)
    head = ["replies of", "n", "accuracy", "kappa", *(f"{c}: precision, recall" for c in labels)]
    lines = ["", f"As {len(labels)} classes:", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, own in card.classes.items():
        by_class = [f"{share(own.precision[c])}, {share(own.recall[c])}" for c in labels]
        cells = [name, str(own.n), share(own.accuracy), number(own.kappa), *by_class]
        lines.append(f"| {' | '.join(cells)} |")
    unreliable = _judged_by(card)[0].unreliable
    if unreliable:
        lines += ["", f"**Unreliable: {', '.join(unreliable)}.** Ask a model for figures of these classes."]
    return lines


def share(value: Estimate) -> str:
    """`91 % [88, 93]`."""
    if np.isnan(value.value):
        return "-"
    return f"{100 * value.value:.0f} % [{100 * value.low:.0f}, {100 * value.high:.0f}]"


def number(value: Estimate) -> str:
    """`0.87 [0.84, 0.91]`."""
    return "-" if np.isnan(value.value) else f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _agreement(found: dict[str, Any]) -> Agreement:
    values = ("accuracy", "precision", "recall", "kappa")
    return Agreement(**{**found, **{key: _estimate(found[key]) for key in values}})


def _classes(found: dict[str, Any]) -> ClassAgreement:
    single = {key: _estimate(found[key]) for key in ("accuracy", "kappa")}
    by_class = {
        key: {name: _estimate(own) for name, own in found[key].items()} for key in ("precision", "recall")
    }
    return ClassAgreement(**{**found, **single, **by_class})


def _estimate(found: dict[str, Any]) -> Estimate:
    # JSON knows no NaN.
    values: dict[str, Any] = {key: float("nan") if value is None else value for key, value in found.items()}
    return Estimate(**values)


def _rounded(value: Any) -> Any:
    """Numbers to 6 digits, so that a card does not change with the machine; NaN as null."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 6)
    return value
