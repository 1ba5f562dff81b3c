"""A sweep's pictures: one column against another with its Pareto front, and parallel coordinates."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial

from callbacks.metrics.names import Metric
from callbacks.metrics.pareto import front
from callbacks.report.drawing import (
    AFTER,
    BEFORE,
    INK,
    Drawing,
    Point,
    canvas,
    label,
    legend,
    mark,
    staircase,
)
from experiments.studies.definition import TradeOff
from experiments.sweeps.search import CELLS, Search, feasible
from experiments.sweeps.space import Dimension

BROKEN = "#9aa3ad"
"""Trials that break a constraint."""


def trade_off(search: Search, figure: TradeOff) -> Drawing | None:
    """A point a complete trial; None where no two can be compared."""
    columns = search.sweep.columns
    shown = [own for own in search.ranked() if {figure.x, figure.y} <= own.user_attrs[CELLS].keys()]
    shown = [own for own in shown if all(math.isfinite(_value(own, axis)) for axis in (figure.x, figure.y))]
    if len(shown) < 2:
        return None
    points = {own.number: (_value(own, figure.x), _value(own, figure.y)) for own in shown}
    kept = {own.number: points[own.number] for own in shown if feasible(own)}
    signs = (_sign(columns[figure.x].metric), _sign(columns[figure.y].metric))
    best = front(kept, signs)
    title = f"{figure.y} against {figure.x}"
    with canvas(height=4.6) as (picture, axes):
        for number, (x, y) in points.items():
            mark(axes, Point(x, y, str(number), color=AFTER if number in kept else BROKEN))
        staircase(axes, [points[number] for number in best], rising=signs[0] > 0)
        for number in best:
            axes.annotate(
                str(number), points[number], (5, 5), textcoords="offset points", fontsize=9, color=INK
            )
        axes.set(xlabel=figure.x, ylabel=figure.y)
        axes.margins(0.12)
        dots = [Line2D([], [], color=color, marker="o", linestyle="") for color in (AFTER, BROKEN)]
        line = Line2D([], [], color=BEFORE)
        legend(axes, [*dots, line], ["keeps the constraints", "breaks one", "Pareto front"])
    numbers = ", ".join(map(str, best)) or "none"
    says = f"A point a trial, on validation; rates in percent. On the front: trials {numbers}."
    return Drawing(title, says, picture)


def parallel(search: Search) -> Drawing | None:
    """A line a complete trial through its parameters to the metric; None below two trials."""
    ranked = search.ranked()
    if len(ranked) < 2:
        return None
    objective = search.sweep.objective
    dimensions = search.space.dimensions
    keys = [own.key for own in dimensions]
    axes_of = [Axis.of(own, ranked) for own in dimensions]
    axes_of.append(Axis([_value(own, objective) for own in ranked]))
    heights = [own.heights() for own in axes_of]
    with canvas(height=4.6) as (picture, axes):
        picture.set_figwidth(max(6.0, 1.5 * len(heights)))
        places = range(len(heights))
        for line, own in reversed([*enumerate(ranked)]):
            # The better the stronger; the best is drawn last.
            strength = 1.0 if line == 0 else 0.15 + 0.45 * (1 - line / len(ranked))
            color = BEFORE if line == 0 else AFTER if feasible(own) else BROKEN
            axes.plot(places, [own_axis[line] for own_axis in heights], color=color, alpha=strength)
        for place, own_axis in zip(places, axes_of, strict=True):
            axes.axvline(place, color=INK, alpha=0.3, linewidth=0.8)
            for text, height in own_axis.ends().items():
                axes.annotate(text, (place, height), (3, 0), textcoords="offset points", fontsize=8)
        axes.set_xticks(
            [*places], [label(key.rpartition(".")[2], 18) for key in keys] + [label(objective, 18)]
        )
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlim(-0.1, len(heights) - 0.6)
    says = "A line a trial through its values, lowest below; the best one in red, the better the stronger."
    return Drawing("Parallel coordinates", says, picture)


def _value(trial: FrozenTrial, column: str) -> float:
    """In percent, where it is a rate."""
    cell: Mapping[str, Any] = trial.user_attrs[CELLS][column]
    return float(cell["after"]) * (100 if cell["is_rate"] else 1)


def _sign(metric: Metric) -> int:
    return -1 if metric.better == "lower" else 1


@dataclass(frozen=True)
class Axis:
    """One axis of the parallel coordinates: a value a trial.

    Args:
        values: numbers, or the texts of `choices`; None of a trial that does not have the parameter.
        choices: everything that an axis of texts shows, in order.
        log: whether numbers stand by their logarithms.
    """

    values: Sequence[Any]
    choices: Sequence[str] | None = None
    log: bool = False

    @classmethod
    def of(cls, dimension: Dimension, trials: Sequence[FrozenTrial]) -> Axis:
        drawn = [own.params.get(dimension.key) for own in trials]
        own = dimension.distribution
        if isinstance(own, CategoricalDistribution):
            return cls(drawn, [str(choice) for choice in own.choices])
        return cls([None if raw is None else dimension.value(raw) for raw in drawn], log=own.log)

    def heights(self) -> list[float]:
        """Places between 0 and 1; NaN, a gap in its line, where there is no finite value."""
        if self.choices is not None:
            places = {
                choice: number / max(1, len(self.choices) - 1) for number, choice in enumerate(self.choices)
            }
            return [places.get(value, math.nan) for value in self.values]
        numbers = [math.nan if value is None else float(value) for value in self.values]
        scaled = [math.log(value) if self.log else value for value in numbers]
        there = [value for value in scaled if math.isfinite(value)]
        low, high = min(there, default=0.0), max(there, default=0.0)
        if high == low:
            return [0.5 if math.isfinite(value) else math.nan for value in scaled]
        return [(value - low) / (high - low) if math.isfinite(value) else math.nan for value in scaled]

    def ends(self) -> dict[str, float]:
        """What is written at it, and where: the lowest and the highest number, or every text."""
        if self.choices is not None:
            last = max(1, len(self.choices) - 1)
            texts = [label(str(json.loads(choice)), 16) for choice in self.choices]
            return {text: number / last for number, text in enumerate(texts)}
        pairs = zip(self.values, self.heights(), strict=True)
        return {f"{value:.3g}": height for value, height in pairs if height in (0.0, 0.5, 1.0)}
