"""From the rows of its layers to how far training has moved the refusal direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from callbacks.metrics.names import Metric, Quantity
from callbacks.report.cells import Cell, Table, count, estimate
from callbacks.report.measured import Measured
from callbacks.report.results import DirectionAt, Estimate, Measure, RunResults
from datamodules.result_lines import Measurement, Row

QUANTITY: Quantity = "direction"
MEAN = "mean over layers"
"""Name of the row that is of no layer."""


def by_layer(own: Measurement, rows: Mapping[str, Sequence[Row]]) -> list[DirectionAt]:
    """From the first layer on, the mean over layers at the end."""
    return [_read(name, rows[name][0]) for name in sorted(rows, key=lambda name: (name == MEAN, name))]


def of_measured(measured: Sequence[Measured]) -> list[DirectionAt]:
    """Nothing where it was not measured."""
    own = [item for item in measured if item.measurement.quantity == QUANTITY]
    return [layer for item in own for layer in by_layer(item.measurement, item.rows)]


def overall(own: Measurement, rows: Mapping[str, Sequence[Row]]) -> dict[Metric, Measure]:
    """The cosine of the mean over layers; nothing where its row is missing."""
    if MEAN not in rows:
        return {}
    metric = Metric(QUANTITY, own.subject, block=own.block)
    return {metric: Measure(metric, _read(MEAN, rows[MEAN][0]).cosine, own.judge, settings=own.settings)}


def moved(results: RunResults) -> Table:
    """A row a layer, of the latest snapshot."""
    found = results.after.directions if results.after is not None else ()
    rows = [
        [
            Cell(own.name, float(place)),
            estimate(own.cosine),
            *(_number(value) for value in (own.along, own.length)),
            *(_number(value) for value in (own.rank_before, own.rank)),
            count(own.cosine.n),
        ]
        for place, own in enumerate(found)
    ]
    columns = [
        *("after", "cosine to the old one", "apart along the old one", "apart along the new one"),
        *("effective rank before", "after training", "requests"),
    ]
    return Table("How far training moved the refusal direction", columns, rows)


def _read(name: str, row: Row) -> DirectionAt:
    def score(key: str) -> float:
        found = row.verdicts[f"{key}@1"]["score"]
        return math.nan if found is None else float(found)

    cosine = Estimate(score("cosine"), score("low"), score("high"), min(row.counts.values()), "mean")
    rest = {key: score(key) for key in ("along", "length", "rank_before", "rank")}
    return DirectionAt(name, cosine, **rest)


def _number(value: float) -> Cell:
    return Cell("-" if math.isnan(value) else f"{value:.3g}", value)
