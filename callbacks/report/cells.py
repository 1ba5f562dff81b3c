"""What tables are made of: cells with a text and the number that they are sorted by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from callbacks.metrics.names import Metric
from callbacks.report.results import Estimate, Measure, PairedDifference, Snapshot

MISSING = "-"


@dataclass(frozen=True)
class Cell:
    """A text, and the number that it is sorted by (None: by the text; NaN: last)."""

    text: str
    order: float | None = None
    interval: tuple[float, float] | None = None
    """The number's, where the text says one."""


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def estimate(value: Estimate) -> Cell:
    """`12.3 % [8.1, 17.9]` of a share, `1.23 [1.10, 1.36]` of a mean."""
    if math.isnan(value.value):
        return Cell(MISSING, math.nan)
    if value.kind == "mean":
        return Cell(f"{value.value:.3g} [{value.low:.3g}, {value.high:.3g}]", value.value)
    if value.kind == "perplexity":
        return Cell(f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]", value.value)
    return Cell(f"{100 * value.value:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]", value.value)


def p_value(value: float) -> str:
    """As a reader sees it."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def change(value: PairedDifference | None) -> Cell:
    """`-86.8 [-94.1, -75.2], p < 0.001 (+0 -46)`, in percentage points."""
    if value is None or math.isnan(value.difference):
        return Cell(MISSING, math.nan)
    low, mid, high = (100 * part for part in (value.low, value.difference, value.high))
    return Cell(
        f"{mid:+.1f} [{low:+.1f}, {high:+.1f}], {p_value(value.p_value)} (+{value.gained} -{value.lost})",
        value.difference,
    )


def measures(snapshot: Snapshot, kind: str) -> Iterator[Measure]:
    return (measure for measure in snapshot.measures.values() if measure.estimate.kind == kind)


def earlier_cell(snapshot: Snapshot | None, metric: Metric) -> Cell:
    found = snapshot.measures.get(metric) if snapshot is not None else None
    return estimate(found.estimate) if found is not None else Cell(MISSING, math.nan)


def count(n: int) -> Cell:
    return Cell(str(n), n)
