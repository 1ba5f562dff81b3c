"""The long tail: a rate by category of prompts, and the mean over the worst of them.

A mean over all prompts hides a category that a defence forgot. The worst quarter's mean is the conditional
value at risk (CVaR; Rockafellar and Uryasev 2000) over categories of equal weight. It is chosen by the rows
that it is computed from, so that it is too bad on average, and a bootstrap around it is off by as much: where
seven categories of 14 examples are equally bad, a nominal 95 % covers 70 %. So it has no interval, and is for
comparing runs on the same rows. A category of few examples would be chosen for its chance alone: below
`smallest_category`, in any run, it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from callbacks.metrics.hierarchical import Outcomes, SeedRate, seed_rate, stacked
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
        sizes = _sizes([groups for groups in found.values() if groups])
        if sizes:
            names = [name for name in sorted(sizes) if sizes[name] >= study.smallest_category]
            small = [f"{name} ({sizes[name]})" for name in sorted(sizes) if name not in names]
            title = f"{label}, by category"
            if small:
                title += f"; of fewer than {study.smallest_category} examples, left out: {', '.join(small)}"
            columns = ["run", *(f"{name} (n = {sizes[name]})" for name in names), CVAR]
            lines = [_line(name, groups, names, metric) for name, groups in found.items()]
            tables.append(Table(title, columns, lines))
        else:
            none = f"{label}, by category: no run has examples of two or more"
            tables.append(Table(none, ["run"], [[Cell(name)] for name in found]))
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


def _sizes(runs: Sequence[Groups]) -> dict[str, int]:
    """Examples of every category, the fewest that a run has of it: none where one lacks it."""
    names = {category for groups in runs for category in groups}
    return {
        name: min(groups[name].shape[1] if name in groups else 0 for groups in runs) for name in sorted(names)
    }


def tail(rates: Sequence[float], metric: Metric) -> float | None:
    """The mean of the worst quarter of some categories' rates, their number rounded up; None without any, or
    where no direction is worse."""
    if not rates or metric.better is None:
        return None
    number = math.ceil(WORST * len(rates))
    return math.fsum(sorted(rates, reverse=metric.better == "lower")[:number]) / number


def _line(name: str, groups: Groups, names: Sequence[str], metric: Metric) -> list[Cell]:
    """Dashes for a run without categories: one that was not measured."""
    rates = [seed_rate(groups[category]) for category in names if groups]
    cells = [_cell(rate) for rate in rates] or [Cell(MISSING, math.nan) for _ in names]
    worst = tail([rate.value for rate in rates], metric)
    last = Cell(MISSING, math.nan) if worst is None else Cell(f"{100 * worst:.0f}", worst)
    return [Cell(name), *cells, last]


def _cell(own: SeedRate) -> Cell:
    """In percent, with its interval over seeds and examples."""
    text = f"{100 * own.value:.0f} [{100 * own.low:.0f}, {100 * own.high:.0f}]"
    return Cell(text, own.value, (own.low, own.high))
