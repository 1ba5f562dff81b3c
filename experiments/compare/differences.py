"""Paired differences between runs on the same examples, by the project's own statistics, as cells.

What was measured in different ways is never paired; its cell says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from callbacks.metrics.estimates import Difference, Estimate, mean_difference, paired_difference
from callbacks.metrics.names import Metric
from callbacks.report.cells import MISSING, change
from callbacks.report.events import Events
from callbacks.report.load import text_differences
from callbacks.report.results import PairedDifference, PerplexityDifference
from callbacks.report.tables_beside import shift
from experiments.compare.columns import Column
from experiments.compare.runs import Run
from experiments.compare.ways import Ways, letter_of, way_of

Kind = Literal["", "better", "worse", "unlike", "none"]


@dataclass(frozen=True)
class PairCell:
    """A difference as a reader sees it."""

    text: str
    order: float = math.nan
    kind: Kind = "none"
    """Whether the interval lies on one side of 0 and that is better or worse; `unlike`: not paired."""


class Pairs:
    """The differences between any two of some runs; each pair is computed once.

    Args:
        runs: as they are shown.
        columns: of the table; those with a metric have a difference.
        ways: see `ways.py`.
    """

    def __init__(self, runs: Sequence[Run], columns: Sequence[Column], ways: Ways) -> None:
        self.runs, self.ways = runs, ways
        self.metrics = [c.metric for c in columns if c.metric is not None and self._pairable(c.metric)]
        self._events: list[Mapping[Metric, Events]] = [{e.metric: e for e in run.events} for run in runs]
        self._known: dict[tuple[int, int, Metric], Difference | None] = {}

    def _pairable(self, metric: Metric) -> bool:
        """Whether there is a number an example: of losses and efforts only their means are kept."""
        measures = [own for run in self.runs if (own := run.measure(metric)) is not None]
        return any(own.estimate.kind != "mean" or own.values for own in measures)

    def against(self, first: int) -> list[list[PairCell]]:
        """Every run minus the first one, a row a run, a cell a metric."""
        return [
            [self._cell(first, second, metric) for metric in self.metrics] for second in range(len(self.runs))
        ]

    def texts(self, first: int) -> dict[int, dict[Metric, PairCell]]:
        """The same of perplexities, by run; every one takes thousands of resamples."""
        found: dict[int, dict[Metric, PairCell]] = {}
        for number, run in enumerate(self.runs):
            if number != first:
                own = text_differences(self.runs[first].texts, run.texts)
                found[number] = {one.metric: _perplexity(one) for one in own}
        return found

    def _cell(self, first: int, second: int, metric: Metric) -> PairCell:
        one, other = self.runs[first].measure(metric), self.runs[second].measure(metric)
        if first == second or one is None or other is None:
            return PairCell(MISSING)
        if way_of(one) != way_of(other):
            ours, theirs = letter_of(self.ways, other), letter_of(self.ways, one)
            return PairCell(f"not paired: way {ours} against {theirs}", kind="unlike")
        if one.estimate.kind == "mean":
            grade = mean_difference(one.values, other.values)
            return PairCell(MISSING) if grade is None else _mean(metric, grade)
        difference = self._difference(first, second, metric)
        if difference is None:
            return PairCell(MISSING)
        most = max(one.estimate.n, other.estimate.n)
        return _rate(metric, difference, f", n = {difference.n} of {most}" if difference.n < most else "")

    def _difference(self, first: int, second: int, metric: Metric) -> Difference | None:
        if first > second:
            other = self._difference(second, first, metric)
            return None if other is None else other.reversed
        key = first, second, metric
        if key not in self._known:
            one, two = self._events[first].get(metric), self._events[second].get(metric)
            if one is None or two is None:
                self._known[key] = None
            else:
                self._known[key] = paired_difference(one.outcome, two.outcome)
        return self._known[key]


def _rate(metric: Metric, own: Difference, beside: str) -> PairCell:
    cell = change(PairedDifference(metric, **vars(own)))
    return PairCell(cell.text + beside, own.difference, _kind(metric, own.low, own.high))


def _mean(metric: Metric, own: Estimate) -> PairCell:
    return PairCell(shift(own).text, own.value, _kind(metric, own.low, own.high))


def _perplexity(own: PerplexityDifference) -> PairCell:
    if math.isnan(own.difference):
        return PairCell(MISSING)
    text = f"{own.difference:+.3g} [{own.low:+.3g}, {own.high:+.3g}]"
    return PairCell(text, own.difference, _kind(own.metric, own.low, own.high))


def _kind(metric: Metric, low: float, high: float) -> Kind:
    if metric.better is None or low <= 0 <= high:
        return ""
    return "better" if (low > 0) == (metric.better == "higher") else "worse"
