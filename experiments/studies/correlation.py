"""How far one column tells another across a study's runs: correlations, a point per run.

Seeds of one run are no further models: their mean is the point. Pearson's r with Fisher's interval, and the
correlation of ranks, which asks for no straight line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import pearsonr, spearmanr

from callbacks.report.cells import MISSING, Cell, Table, p_value
from experiments.studies.comparison import Compared
from experiments.studies.definition import Study, TradeOff

FEWEST = 4
"""Points below which there is no interval."""


@dataclass(frozen=True)
class Correlation:
    """Over n points; p values are two-sided, of no correlation."""

    n: int
    r: float
    low: float
    high: float
    p: float
    rank: float
    rank_p: float


def correlation(x: list[float], y: list[float]) -> Correlation | None:
    """None with too few points, or where one of the two does not vary."""
    if len(x) < FEWEST or min(len({*x}), len({*y})) < 2:
        return None
    straight, ranks = pearsonr(x, y), spearmanr(x, y)
    low, high = straight.confidence_interval(0.95)
    own = straight.statistic, low, high, straight.pvalue, ranks.statistic, ranks.pvalue
    return Correlation(len(x), *map(float, own))


def correlations(study: Study, rows: Mapping[str, Compared]) -> Table | None:
    """A row per pair of columns that the study asks for."""
    if not study.correlations:
        return None
    columns = ["across runs", "runs", "Pearson's r", "p", "rank correlation", "p of ranks"]
    return Table("Correlations", columns, [_row(pair, rows) for pair in study.correlations])


def _row(pair: TradeOff, rows: Mapping[str, Compared]) -> list[Cell]:
    points = [
        (x.value, y.value)
        for own in rows.values()
        if (x := own.cell(pair.x)) is not None and (y := own.cell(pair.y)) is not None
    ]
    found = correlation([x for x, _ in points], [y for _, y in points])
    title = [Cell(f"{pair.y} against {pair.x}"), Cell(str(len(points)), len(points))]
    if found is None:
        return [*title, *(Cell(MISSING, math.nan) for _ in range(4))]
    return [
        *title,
        Cell(f"{found.r:.2f} [{found.low:.2f}, {found.high:.2f}]", found.r, (found.low, found.high)),
        Cell(p_value(found.p), found.p),
        Cell(f"{found.rank:.2f}", found.rank),
        Cell(p_value(found.rank_p), found.rank_p),
    ]
