"""The long tail: a rate by category of prompts, and the mean over the worst of them.

A mean over all prompts hides a category that a defence forgot. The worst quarter's mean is the conditional
value at risk (CVaR) over categories of equal weight; it is chosen by the rows that it is computed from, and
so too bad on average: it is for comparing runs on the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from callbacks.metrics.estimates import wilson_interval
from callbacks.metrics.names import Metric
from callbacks.report.cells import MISSING, Cell, Table
from experiments.studies.comparison import Compared
from experiments.studies.definition import Study

WORST = 0.25
"""Share of the categories that the last column is about."""
Rates = dict[str, tuple[float, int]]
"""Category -> rate (mean over seeds), examples."""


def by_category(study: Study, rows: Mapping[str, Compared]) -> list[Table]:
    """A table per column of `study.categories`: a row per run, a column per category."""
    tables = []
    for label in study.categories:
        metric = study.columns[label].metric
        found = {name: rates(own, metric) for name, own in rows.items()}
        sizes = {category: n for own in found.values() for category, (_, n) in own.items()}
        if sizes:
            names = sorted(sizes)
            columns = ["run", *(f"{name} (n = {sizes[name]})" for name in names), f"worst {WORST:.0%}"]
            lines = [
                [Cell(name), *(_cell(own.get(category)) for category in names), _tail(own, metric)]
                for name, own in found.items()
            ]
            tables.append(Table(f"{label}, by category", columns, lines))
    return tables


def rates(own: Compared, metric: Metric) -> Rates:
    """The rate in every category that there are several of; nothing where there are none."""
    by_seed = [
        event.groups.get("category", {}) for seed in own.by_seed.values() if (event := seed.get(metric))
    ]
    shared = set.intersection(*(set(groups) for groups in by_seed)) if by_seed else set()
    return {
        category: (fmean(groups[category].value for groups in by_seed), by_seed[0][category].n)
        for category in shared
    }


def tail(own: Rates, metric: Metric) -> float | None:
    """Mean rate of the worst quarter of the categories; None without any, or where no direction is worse."""
    if not own or metric.better is None:
        return None
    values = sorted((value for value, _ in own.values()), reverse=metric.better == "lower")
    return fmean(values[: math.ceil(WORST * len(values))])


def _cell(own: tuple[float, int] | None) -> Cell:
    """With Wilson's interval of one seed's examples."""
    if own is None:
        return Cell(MISSING, math.nan)
    value, n = own
    low, high = wilson_interval(value * n, n)
    return Cell(f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]", value)


def _tail(own: Rates, metric: Metric) -> Cell:
    value = tail(own, metric)
    return Cell(MISSING, math.nan) if value is None else Cell(f"{100 * value:.0f}", value)
