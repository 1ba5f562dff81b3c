"""Which numbers may be compared: those that were measured in the same way, by the same judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from callbacks.metrics.names import Metric
from callbacks.report.cells import MISSING, Cell, Table, count
from callbacks.report.results import Measure
from experiments.compare.runs import Run

Way = tuple[str, str]
"""Judge (`name@revision`), and the digest of attack, its budget, length of replies, seed and rows."""
Ways = Mapping[Metric, Mapping[Way, str]]
"""Metric -> way -> its letter, of metrics that were measured in more ways than one."""


def way_of(measure: Measure) -> Way:
    return measure.judge, measure.settings


def ways_of(runs: Sequence[Run]) -> dict[Metric, dict[Way, str]]:
    """Letters in the order of the runs; nothing of what all runs have measured alike."""
    found: dict[Metric, dict[Way, str]] = {}
    for run in runs:
        for metric, measure in run.after.measures.items():
            own = found.setdefault(metric, {})
            own.setdefault(way_of(measure), letter(len(own)))
    return {metric: own for metric, own in found.items() if len(own) > 1}


def letter(number: int) -> str:
    """A to Z, then A1, B1, ..."""
    rounds, place = divmod(number, len(ascii_uppercase))
    return ascii_uppercase[place] + (str(rounds) if rounds else "")


def letter_of(ways: Ways, measure: Measure) -> str:
    """The letter of a measure's way; '' where all runs have the same."""
    return ways.get(measure.metric, {}).get(way_of(measure), "")


def ways_table(runs: Sequence[Run], ways: Ways) -> Table:
    """A row a metric and way: what is known of it, and whose it is."""
    rows = []
    for metric, letters in ways.items():
        if metric.quantity.endswith("_per_example") or metric.quantity.startswith("loss_"):
            continue  # they go with the attack's success, which has a row
        for way, own_letter in letters.items():
            own = [r for r in runs if (m := r.measure(metric)) is not None and way_of(m) == way]
            first = own[0].after.measures
            passes = first.get(Metric("passes_per_example", metric.subject, metric.attack))
            rows.append(
                [
                    Cell(metric.titled(way[0])),
                    Cell(own_letter),
                    Cell(way[0] or MISSING),
                    Cell(MISSING)
                    if passes is None
                    else Cell(f"{passes.estimate.value:,.0f}", passes.estimate.value),
                    count(first[metric].estimate.n),
                    Cell(settings_text(way[1])),
                    Cell(", ".join(run.name for run in own)),
                ]
            )
    columns = ("metric", "way", "judge", "passes per example", "n", "settings", "runs")
    return Table("Measured in different ways", columns, rows)


def settings_text(settings: str) -> str:
    """The digest; of a worst case, whose parts are those of its attacks, that there are several."""
    return f"{settings.count(' ') + 1} attacks' own" if "=" in settings else settings or MISSING
