"""The numbers of several runs for others: every row with its judge's card and the attack's budget."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from callbacks.evaluations.benign import AWAY_FROM_ANSWER, TOWARDS_REFUSAL
from callbacks.judges.card import calibration
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT, Metric
from callbacks.report.cells import MISSING, Cell, Table, estimate
from callbacks.report.escape import markdown, printable
from callbacks.report.markdown import table_text
from callbacks.report.results import Estimate, Measure
from callbacks.report.tables import arguments, class_name, inline
from callbacks.run_folder.loggers import flat
from datamodules.evaluation import Subject
from experiments.compare.columns import Column
from experiments.compare.runs import Run
from experiments.compare.ways import Ways, letter_of

NO_ATTACK = "no attack"
LONGEST = 160
"""Characters of an attack's settings beside its budget; the CSV has them whole."""
COLUMNS = (
    "run", "stage", "step", "weights", "metric", "title", "better", "value", "low", "high", "n", "complete",
    "before", "way", "settings", "judge", "judge_version", "judge_accuracy", "judge_accuracy_low",
    "judge_accuracy_high", "judge_n", "judge_card", "attack", "attack_settings", "passes_per_example",
    "queries_per_example", "seconds_per_example", "budget",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One number of one run, with all that one has to know to rank it."""

    run: Run
    measure: Measure
    way: str
    """The letter of its way; '' where all runs have the same."""

    @property
    def budget(self) -> str:
        """`GCG (num_steps 100): 12,345 passes, 6,400 queries, 1.2 s an example`."""
        attack = self.measure.metric.attack
        if not attack:
            return NO_ATTACK
        if attack in (WORST_CASE, WORST_CASE_TEXT):
            own = [a.name for a in self.run.after.attacks.values() if a.typed or attack == WORST_CASE]
            return f"the best of {', '.join(own)}; their budgets are in their own rows"
        spent = [
            f"{own.value:,.{0 if unit != 's' else 2}f} {unit}"
            for unit, own in zip(("passes", "queries", "s"), self.efforts, strict=True)
            if own is not None and own.value
        ]
        own_settings = self.attack_settings or attack.replace("_", " ")
        if len(own_settings) > LONGEST:
            own_settings = f"{own_settings[:LONGEST]}..."
        told = f"{own_settings}: {', '.join(spent)} an example" if spent else own_settings
        return f"{self.carried}; on harmful requests {told}" if self.carried else told

    @property
    def efforts(self) -> list[Estimate | None]:
        """Passes, queries and seconds an example; of a worst case none, it has every attack's. Of benign
        prompts that were not searched for themselves, those of the harmful requests' search."""
        metric = self.measure.metric
        own = self._efforts(metric.subject, metric.attack)
        return own if any(own) or metric.subject == "harmful" else self._efforts("harmful", self.attack)

    def _efforts(self, subject: Subject, attack: str) -> list[Estimate | None]:
        found = (
            self.run.measure(Metric(quantity, subject, attack))
            for quantity in ("passes_per_example", "queries_per_example", "seconds_per_example")
        )
        return [None if own is None else own.estimate for own in found]

    @property
    def carried(self) -> str:
        """How benign prompts met the attack, where their own effort is in no row."""
        metric = self.measure.metric
        if metric.subject == "harmful" or any(self._efforts(metric.subject, metric.attack)):
            return ""
        return "carried, not searched for" if metric.attack == self.attack else "the same search at these"

    @property
    def attack(self) -> str:
        """The attack's name in its suite, whichever way its search went."""
        return self.measure.metric.attack.removesuffix(TOWARDS_REFUSAL).removesuffix(AWAY_FROM_ANSWER)

    @property
    def attack_settings(self) -> str:
        """The attack as the configuration has it; '' where that was not recorded, or names no such attack."""
        block = attacks_of(self.run.results.configuration).get(self.attack)
        name, inside = class_name(block), inline(flat(dict(arguments(block))))
        return f"{name} ({inside})" if name and inside else name

    @property
    def judges(self) -> list[str]:
        return [name for name in self.measure.judge.split(" or ") if name]


def attacks_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Name of an attack in the evaluations -> its block."""
    callbacks = (config.get("trainer") or {}).get("callbacks") or ()
    found: dict[str, Any] = {}
    for block in callbacks:
        found |= arguments(block).get("attacks") or {}
    return found


def entries(
    runs: Sequence[Run], columns: Sequence[Column], ways: Ways
) -> Iterator[tuple[Column, list[Entry]]]:
    """By column of a metric: its entries, those of one way together, the best first."""
    for column in columns:
        if column.metric is None:
            continue
        found = [
            Entry(run, own, letter_of(ways, own))
            for run in runs
            if (own := run.measure(column.metric)) is not None
        ]
        sign = 1 if column.better == "lower" else -1
        found.sort(key=lambda entry: (entry.way, _last(sign * entry.measure.estimate.value)))
        yield column, found


def as_csv(runs: Sequence[Run], columns: Sequence[Column], ways: Ways) -> str:
    """Every metric of every run, a line each; shares between 0 and 1."""
    stream = io.StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    lines.writerow(COLUMNS)
    for column, found in entries(runs, columns, ways):
        for entry in found:
            lines.writerow([printable(str(value), one_line=True) for value in _line(column, entry)])
    return stream.getvalue()


def as_markdown(runs: Sequence[Run], columns: Sequence[Column], ways: Ways) -> str:
    """The metrics that the page shows at once, a table each."""
    parts = [
        "# Leaderboard",
        f"{len(runs)} runs, `{runs[0].results.stage}`. Ways (A, B, ...) were measured differently: rank "
        "within one of them only.",
    ]
    for column, found in entries(runs, columns, ways):
        if not column.shown:
            continue
        rows = [_row(entry) for entry in found]
        better = f" ({column.better} is better)" if column.better else ""
        names = (
            "run",
            "value",
            "n",
            "before",
            "way",
            "judge",
            "version",
            "its accuracy",
            "attack and budget",
        )
        parts += [f"## {markdown(column.title)}{better}", table_text(Table(column.title, names, rows))]
    return "\n\n".join(parts) + "\n"


def _row(entry: Entry) -> list[Cell]:
    before = _before(entry)
    judges = [judge.partition("@") for judge in entry.judges]
    return [
        Cell(entry.run.name),
        estimate(entry.measure.estimate),
        Cell(str(entry.measure.estimate.n)),
        Cell(MISSING) if before is None else estimate(before),
        Cell(entry.way or MISSING),
        Cell(" or ".join(name for name, _, _ in judges) or MISSING),
        Cell(" or ".join(version for _, _, version in judges) or MISSING),
        Cell("; ".join(calibration(judge).text for judge in entry.judges) or MISSING),
        Cell(entry.budget),
    ]


def _line(column: Column, entry: Entry) -> list[Any]:
    own, after, before = entry.measure.estimate, entry.run.after, _before(entry)
    cards = [calibration(judge) for judge in entry.judges]
    known = cards[0].accuracy if len(cards) == 1 else None
    judges = [judge.partition("@") for judge in entry.judges]
    return [
        entry.run.name,
        entry.run.results.stage,
        after.step,
        after.model,
        entry.measure.metric.key,
        column.title,
        column.better,
        own.value,
        own.low,
        own.high,
        own.n,
        after.complete,
        "" if before is None else before.value,
        entry.way,
        entry.measure.settings,
        " or ".join(name for name, _, _ in judges),
        " or ".join(version for _, _, version in judges),
        *(("", "", "", "") if known is None else (known.value, known.low, known.high, known.n)),
        "; ".join(card.text for card in cards),
        entry.measure.metric.attack or NO_ATTACK,
        entry.attack_settings,
        *("" if effort is None else effort.value for effort in entry.efforts),
        entry.budget,
    ]


def _before(entry: Entry) -> Estimate | None:
    before = entry.run.before
    own = None if before is None else before.measures.get(entry.measure.metric)
    return None if own is None else own.estimate


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value
