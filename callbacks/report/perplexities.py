"""From the scored windows of a text to perplexities, and to their difference before and after training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from callbacks.metrics.names import Metric, Quantity
from callbacks.metrics.perplexity import perplexity, perplexity_difference
from callbacks.report.results import Measure, PerplexityDifference
from datamodules.result_lines import Measurement, Row

UNITS: dict[Quantity, str] = {
    "token_perplexity": "tokens",
    "word_perplexity": "words",
    "byte_perplexity": "bytes",
}


def of_text(own: Measurement, rows: Mapping[str, Sequence[Row]]) -> dict[Metric, Measure]:
    """Per token, per word and per byte. Windows stand in the order of their keys, which is the text's."""
    windows = [rows[key][0] for key in sorted(rows)]
    found = {}
    for quantity, unit in UNITS.items():
        units = [row.counts[unit] for row in windows]
        metric = Metric(quantity, own.subject, block=own.block)
        estimate = perplexity([_nats(row, own.judge) for row in windows], units)
        found[metric] = Measure(metric, estimate, own.judge, settings=own.settings, units=sum(units))
    return found


def differences(
    own: Measurement, before: Mapping[str, Sequence[Row]], after: Mapping[str, Sequence[Row]]
) -> list[PerplexityDifference]:
    """after - before on the windows that both have; none where there is none."""
    keys = sorted(before.keys() & after.keys())
    found = []
    for quantity, unit in UNITS.items() if keys else ():
        metric = Metric(quantity, own.subject, block=own.block)
        difference = perplexity_difference(
            [_nats(before[key][0], own.judge) for key in keys],
            [_nats(after[key][0], own.judge) for key in keys],
            [after[key][0].counts[unit] for key in keys],
        )
        found.append(PerplexityDifference(metric, *difference, len(keys)))
    return found


def _nats(row: Row, judge: str) -> float:
    score = row.verdicts[judge]["score"]
    return math.nan if score is None else float(score)
