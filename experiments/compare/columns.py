"""The table of runs: a row a run, a column a metric, a fact or a differing field of the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from callbacks.metrics.names import Metric, Quantity
from callbacks.report.cells import MISSING, estimate
from callbacks.report.results import Measure
from callbacks.report.tables import facts, warnings
from experiments.compare.configurations import Differing
from experiments.compare.runs import Run
from experiments.compare.ways import Ways, letter_of

HEADLINES: set[Quantity] = {"refusal_rate", "over_refusal_rate", "exact_match", "success_rate"}
"""Shown at once, of the main sets of prompts."""
ALWAYS: set[Quantity] = {"accuracy", "grade", "word_perplexity", "full_refusal_rate"}
"""Shown at once, of whatever set."""
FACTS = ("model", "objective", "attack", "data", "seed", "step", "revision")
MOST_SHOWN = 14
"""Columns of metrics that are shown at once, at most; every other is a click away."""


@dataclass(frozen=True)
class Column:
    """One column after the run's name."""

    title: str
    group: str
    """Under which heading it can be chosen."""
    shown: bool
    """Whether it is shown at once."""
    metric: Metric | None = None
    percent: bool = False
    ways: int = 1
    """In how many ways the runs have measured it."""

    @property
    def better(self) -> str:
        return "" if self.metric is None else self.metric.better or ""


@dataclass(frozen=True)
class RunCell:
    """What a run says in one column."""

    text: str
    order: float | None = None
    """What it is sorted by; None: the text, NaN: last."""
    interval: str = ""
    before: str = ""
    n: int = 0
    way: str = ""
    share: float | None = None
    """Length of its bar in percent; None draws none."""


@dataclass(frozen=True)
class RunRow:
    run: Run
    warnings: Sequence[str]
    cells: Sequence[RunCell]


def columns_of(runs: Sequence[Run], ways: Ways, fields: Sequence[Differing]) -> list[Column]:
    """Metrics that any run has, in the order in which reports show them; facts; fields that differ."""
    judges: dict[Metric, list[str]] = {}
    kinds: dict[Metric, str] = {}
    for run in runs:
        for metric, measure in run.after.measures.items():
            judges.setdefault(metric, []).append(measure.judge)
            kinds[metric] = measure.estimate.kind
    headlines = [metric for metric in judges if _headline(metric)] or list(judges)
    shown = set(headlines[:MOST_SHOWN])
    found = [
        Column(
            metric.titled(" or ".join(dict.fromkeys(judges[metric]))),
            group_of(metric),
            metric in shown,
            metric,
            kinds[metric] == "rate",
            len(ways.get(metric, {})) or 1,
        )
        for metric in judges
    ]
    known = [facts(run.results) for run in runs]
    for name in FACTS:
        own = {each.get(name, "") for each in known}
        if own != {""}:
            found.append(Column(name, "About the run", len(own) > 1 and name not in ("revision", "data")))
    return [*found, *(Column(field.key, "Configuration", False) for field in fields)]


def rows_of(
    runs: Sequence[Run], columns: Sequence[Column], ways: Ways, fields: Sequence[Differing]
) -> list[RunRow]:
    """A row a run, a cell a column."""
    by_key = {field.key: field for field in fields}
    return [
        RunRow(run, warnings(run.results), [_cell(run, number, column, ways, by_key) for column in columns])
        for number, run in enumerate(runs)
    ]


def group_of(metric: Metric) -> str:
    """The heading under which a metric can be chosen."""
    if metric.quantity.endswith("_per_example") or metric.quantity.startswith("loss_"):
        return "Attacks: losses and effort"
    if metric.block:
        return "Named sets"
    if metric.judge:
        return "Further judges"
    if not metric.attack:
        return "Without an attack"
    return "Under attack" if metric.subject == "harmful" else "Benign prompts under attack"


def _headline(metric: Metric) -> bool:
    if metric.quantity in ALWAYS:
        return True
    main = metric.quantity in HEADLINES and not metric.block and not metric.judge
    return main and (not metric.attack or metric.subject == "harmful")


def _cell(run: Run, number: int, column: Column, ways: Ways, fields: Mapping[str, Differing]) -> RunCell:
    if column.metric is not None:
        return _measured(run, column.metric, ways)
    if column.group == "Configuration":
        text = fields[column.title].values[number]
    else:
        text = facts(run.results).get(column.title, MISSING)
    try:
        return RunCell(text, float(text))
    except ValueError:
        return RunCell(text)


def _measured(run: Run, metric: Metric, ways: Ways) -> RunCell:
    own = run.measure(metric)
    if own is None or math.isnan(own.estimate.value):
        return RunCell(MISSING, math.nan)
    text, interval = _parts(own)
    before = run.before.measures.get(metric) if run.before is not None else None
    return RunCell(
        text,
        own.estimate.value,
        interval,
        "" if before is None or math.isnan(before.estimate.value) else _parts(before)[0],
        own.estimate.n,
        letter_of(ways, own),
        100 * own.estimate.value if own.estimate.kind == "rate" else None,
    )


def _parts(measure: Measure) -> tuple[str, str]:
    """`2.5 %` and `[1.1, 5.7]`."""
    value, _, interval = estimate(measure.estimate).text.partition(" [")
    return value, f"[{interval}"
