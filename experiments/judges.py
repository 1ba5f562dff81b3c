"""Measure judges against labels that people gave, and store a calibration card with each.

    python -m experiments.judges      # configs/judges/xstest.yaml, cards to callbacks/judges/cards
    python -m experiments.judges --config mine.yaml --out cards

A card says accuracy, precision, recall and Cohen's kappa with 95 % intervals, over all and by model. Every
report prints its line beneath the tables.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from callbacks.judges.base import Judge, Judgement, judge_all, label
from callbacks.judges.card import CARDS, HELD_OUT, Agreement, Card, agreement, document, write_card
from callbacks.judges.classes import ClassAgreement, class_agreement
from callbacks.metrics.estimates import rate
from datamodules.fields import checked
from datamodules.sources.files import read_records
from experiments.config.errors import PROJECT_ROOT

XSTEST = PROJECT_ROOT / "configs" / "judges" / "xstest.yaml"


@checked
@dataclass(frozen=True)
class LabelledSet:
    """A file of replies that people labelled."""

    path: str
    model: str
    """Whose replies they are."""
    prompt: str = "prompt"
    """Column of the request."""
    completion: str = "completion"
    """Column of the reply."""
    label: str = "label"
    """Column of the label."""
    expected: str | None = None
    """Column of the harmful target or the right reply; null where there is none."""
    id: str | None = None
    """Column of the row's name, which a trial's `seen` looks at."""


@checked
@dataclass(frozen=True)
class Trial:
    """A judge, and the labels of which it should say yes and no; all other labels are counted apart."""

    judge: Judge
    positive: list[str]
    negative: list[str]
    finds: str
    """What its yes should mean."""
    seen: str | None = None
    """Regular expression: rows whose id has a match were looked at when the judge was made. The others are
    reported apart, as held out."""
    held_out: list[str] | None = None
    """Models whose replies were not looked at; null where `seen` says all."""
    classes: dict[str, float] | None = None
    """Label -> the score by which a judge of several classes gives it; they are measured too."""


@dataclass(frozen=True)
class LabelledReply:
    """One row of a labelled set."""

    model: str
    prompt: str
    completion: str
    expected: str
    label: str
    id: str


def read(labelled: LabelledSet) -> list[LabelledReply]:
    """Raises: ValueError naming file, line and column where a cell is missing."""
    columns = [labelled.prompt, labelled.completion, labelled.label]
    columns += [column for column in (labelled.expected, labelled.id) if column is not None]
    found = []
    for line, record in read_records(labelled.path):
        missing = next((column for column in columns if record.get(column) is None), None)
        if missing is not None:
            raise ValueError(
                f"{labelled.path}:{line}: expected a column {missing!r}, got {sorted(record)}; set the set's "
                "prompt, completion, label, expected or id"
            )
        cell = {column: str(record[column]) for column in columns}
        found.append(
            LabelledReply(
                model=labelled.model,
                prompt=cell[labelled.prompt],
                completion=cell[labelled.completion],
                expected=cell[labelled.expected] if labelled.expected is not None else "",
                label=cell[labelled.label],
                id=cell[labelled.id] if labelled.id is not None else "",
            )
        )
    return found


def measure(trial: Trial, replies: Sequence[LabelledReply], labels: str, files: dict[str, str]) -> Card:
    """The card of one judge. Raises: ValueError where no reply has one of the trial's labels."""
    judgements = judge_all(
        trial.judge,
        [reply.prompt for reply in replies],
        [reply.completion for reply in replies],
        [reply.expected for reply in replies],
    )
    verdicts = [judgement.verdict for judgement in judgements]
    judged = list(zip(replies, verdicts, strict=True))
    counted = [pair for pair in judged if pair[0].label in (*trial.positive, *trial.negative)]
    if not counted:
        raise ValueError(
            f"{label(trial.judge)}: expected replies labelled {trial.positive + trial.negative}, got "
            f"{sorted({reply.label for reply in replies})}; set positive and negative"
        )

    def among(pairs: list[tuple[LabelledReply, bool]]) -> Agreement:
        return agreement([v for _, v in pairs], [reply.label in trial.positive for reply, _ in pairs])

    unseen = [pair for pair in counted if _unseen(trial, pair[0])]
    apart = sorted({reply.label for reply in replies} - {*trial.positive, *trial.negative})
    models = dict.fromkeys(reply.model for reply, _ in counted)
    return Card(
        judge=label(trial.judge),
        finds=trial.finds,
        labels=labels,
        overall=among(counted),
        unseen=among(unseen) if unseen else None,
        models={model: among([pair for pair in counted if pair[0].model == model]) for model in models},
        apart={name: rate([verdict for reply, verdict in judged if reply.label == name]) for name in apart},
        files=files,
        classes=_classes(trial, replies, judgements) if trial.classes is not None else {},
    )


def _unseen(trial: Trial, reply: LabelledReply) -> bool:
    """Whether nobody looked at the reply, as far as the trial says."""
    said = [not re.search(trial.seen, reply.id)] if trial.seen is not None else []
    said += [reply.model in trial.held_out] if trial.held_out is not None else []
    return bool(said) and all(said)


def _classes(
    trial: Trial, replies: Sequence[LabelledReply], judgements: Sequence[Judgement]
) -> dict[str, ClassAgreement]:
    """Agreement over all classes: of all replies, of those held out, and by model.

    Raises: ValueError for a score that is no class's, or a label that the trial does not name.
    """
    assert trial.classes is not None
    names = {score: name for name, score in trial.classes.items()}
    odd = next((own.score for own in judgements if own.score is None or own.score not in names), 0.0)
    unnamed = sorted({reply.label for reply in replies} - trial.classes.keys())
    if odd not in names or unnamed:
        got = f"the label {unnamed[0]!r}" if unnamed else f"the score {odd}"
        raise ValueError(
            f"{label(trial.judge)}: expected labels and scores among {trial.classes}, got {got}; set classes"
        )
    judged = [
        (reply, names[own.score])
        for reply, own in zip(replies, judgements, strict=True)
        if own.score is not None
    ]

    def among(pairs: list[tuple[LabelledReply, str]]) -> ClassAgreement:
        return class_agreement(
            [own for _, own in pairs], [reply.label for reply, _ in pairs], list(names.values())
        )

    unseen = [pair for pair in judged if _unseen(trial, pair[0])]
    models = dict.fromkeys(reply.model for reply in replies)
    return {
        "all": among(judged),
        **({HELD_OUT: among(unseen)} if unseen else {}),
        **{model: among([pair for pair in judged if pair[0].model == model]) for model in models},
    }


def calibrate(labels: str, sets: list[LabelledSet], trials: list[Trial], out: str = str(CARDS)) -> list[Card]:
    """Measure every judge on all sets and write its card.

    Args:
        labels: what the labelled sets are, in a few words for the line beneath a table.
        sets: labelled replies.
        trials: the judges, and the labels of which each should say yes.
        out: folder of the cards; the packaged ones are what reports print.
    """
    replies = [reply for labelled in sets for reply in read(labelled)]
    files = {Path(own.path).name: _digest(own.path) for own in sets}
    cards = [measure(trial, replies, labels, files) for trial in trials]
    for card in cards:
        print(f"{document(card)}\ncard: {write_card(card, Path(out))}\n")
    return cards


def main(arguments: Sequence[str] | None = None) -> list[Card]:
    """The command line."""
    parser = ArgumentParser(prog="python -m experiments.judges", description=__doc__, parser_mode="omegaconf")
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(calibrate)
    given = list(arguments) if arguments is not None else None
    parser.default_config_files = [str(XSTEST)]
    options = parser.instantiate(parser.parse_args(given))
    try:
        return calibrate(options.labels, options.sets, options.trials, options.out)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    main()
