"""The long tail: a rate by category of prompts, and the mean over the worst of them.

A mean over all prompts hides a category that a defence forgot. The worst quarter's mean is the conditional
value at risk (CVaR) over categories of equal weight; it is chosen by the rows that it is computed from, and
so too bad on average: it is for comparing runs on the same rows. A category of few examples would be chosen
for its chance alone: below `smallest_category` it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from callbacks.metrics.hierarchical import Outcomes, SeedRate, seed_rate, stacked, tail_rate
from callbacks.metrics.names import Metric
from callbacks.report.cells import MISSING, Cell, Table
from experiments.studies.comparison import Compared
from experiments.studies.definition import Study

WORST = 0.25
"""Share of the categories that the last column is about."""
CVAR = f"CVaR: mean of the worst {100 * WORST:.0f} % of categories"
Groups = dict[str, Outcomes]
"""Category -> outcomes of its examples, a row a seed."""


def by_category(study: Study, rows: Mapping[str, Compared]) -> list[Table]:
    """A table per column of `study.categories`: a row per run, a column per category that is large enough."""
    tables = []
    for label in study.categories:
        metric = study.columns[label].metric
        found = {name: grouped(own, metric) for name, own in rows.items()}
        sizes = {category: own.shape[1] for groups in found.values() for category, own in groups.items()}
        if sizes:
            names = [name for name in sorted(sizes) if sizes[name] >= study.smallest_category]
            small = [f"{name} ({sizes[name]})" for name in sorted(sizes) if name not in names]
            title = f"{label}, by category"
            if small:
                title += f"; of fewer than {study.smallest_category} examples, left out: {', '.join(small)}"
            columns = ["run", *(f"{name} (n = {sizes[name]})" for name in names), CVAR]
            lines = [_line(name, groups, names, metric) for name, groups in found.items()]
            tables.append(Table(title, columns, lines))
    return tables


def grouped(own: Compared, metric: Metric) -> Groups:
    """The outcomes by category, of the examples that all seeds have; nothing where there is one category."""
    by_seed = [event for seed in own.by_seed.values() if (event := seed.get(metric)) is not None]
    categories = by_seed[0].categories if by_seed else {}
    shared = sorted(set.intersection(*(set(event.outcome) for event in by_seed))) if by_seed else []
    if len({categories[key] for key in shared if key in categories}) < 2:
        return {}
    outcomes = stacked([event.outcome for event in by_seed])
    names = np.array([categories[key] for key in shared])
    return {str(name): outcomes[:, names == name] for name in np.unique(names)}


def tail(groups: Groups, metric: Metric) -> SeedRate | None:
    """The worst quarter's mean with its interval; None without any, or where no direction is worse."""
    if not groups or metric.better is None:
        return None
    return tail_rate(groups, WORST, highest=metric.better == "lower")


def _line(name: str, groups: Groups, names: list[str], metric: Metric) -> list[Cell]:
    own = {category: groups[category] for category in names if category in groups}
    rates = [seed_rate(own[category]) if category in own else None for category in names]
    return [Cell(name), *map(_cell, (*rates, tail(own, metric)))]


def _cell(own: SeedRate | None) -> Cell:
    """In percent, with its interval over seeds and examples."""
    if own is None:
        return Cell(MISSING, math.nan)
    return Cell(f"{100 * own.value:.0f} [{100 * own.low:.0f}, {100 * own.high:.0f}]", own.value)
