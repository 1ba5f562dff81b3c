"""From KL divergences of single tokens to their means by position: how deep training reaches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from callbacks.metrics.estimates import mean
from callbacks.metrics.names import Metric, Quantity
from callbacks.report.cells import Cell, Table, count, estimate
from callbacks.report.results import Estimate, Measure, RunResults
from datamodules.result_lines import Measurement, Row

QUANTITY: Quantity = "divergence"


def by_position(own: Measurement, rows: Mapping[str, Sequence[Row]]) -> list[Estimate]:
    """Mean over the requests whose target has such a token, at every position."""
    found: dict[int, list[float]] = {}
    for repeated in rows.values():
        for row in repeated:
            found.setdefault(row.repetition, []).append(_nats(row, own.judge))
    return [mean(found[position]) for position in sorted(found)]


def overall(own: Measurement, rows: Mapping[str, Sequence[Row]]) -> dict[Metric, Measure]:
    """Mean over the requests of the mean over their tokens."""
    metric = Metric(QUANTITY, own.subject, block=own.block)
    values = {
        key: math.fsum(_nats(row, own.judge) for row in repeated) / len(repeated)
        for key, repeated in rows.items()
    }
    measure = Measure(metric, mean([*values.values()]), own.judge, settings=own.settings, values=values)
    return {metric: measure}


def depth(results: RunResults) -> Table:
    """A row a token of the harmful reply, of the latest snapshot; shares are of the nats of all tokens of all
    requests, so that a position that few replies reach counts as few."""
    found = results.after.divergences if results.after is not None else ()
    sums = [own.value * own.n for own in found]
    total = math.fsum(sums)
    rows = [
        [
            Cell(str(position + 1), position + 1),
            estimate(own),
            Cell(f"{100 * nats / total:.0f} %" if total > 0 else "-", nats),
            count(own.n),
        ]
        for position, (own, nats) in enumerate(zip(found, sums, strict=True))
    ]
    title = "How deep training reaches: KL to the base model along the harmful reply"
    return Table(title, ("token", "nats", "share of all", "n"), rows)


def _nats(row: Row, judge: str) -> float:
    score = row.verdicts[judge]["score"]
    return math.nan if score is None else float(score)
