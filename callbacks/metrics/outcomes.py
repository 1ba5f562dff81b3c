"""Per-example outcomes of attacks: worst cases over a suite, success within a budget, signs of mistrust."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from datamodules.result_lines import Row

Budget = Literal["steps", "passes", "queries", "seconds"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)
POINTS = 20
"""Points of a curve of success by budget, at most."""


@dataclass(frozen=True)
class BudgetCurve:
    """Share of examples that an attack had broken within a budget."""

    budget: Sequence[float]
    share: Sequence[float]


def worst_case(outcomes: Sequence[Mapping[str, bool]]) -> dict[str, bool]:
    """Per example whether at least one attack succeeded, over the examples that every attack has tried."""
    if not outcomes:
        return {}
    shared = set.intersection(*(set(own) for own in outcomes))
    return {key: any(own[key] for own in outcomes) for key in outcomes[0] if key in shared}


def spent(rows: Sequence[Row], budget: Budget) -> float:
    """What all repetitions of an attack spent on one example."""
    match budget:
        case "steps":
            return sum(row.steps for row in rows)
        case "passes":
            return sum(row.forward_passes + row.backward_passes for row in rows)
        case "queries":
            return sum(row.queries for row in rows)
        case "seconds":
            return math.fsum(row.seconds for row in rows)


def success_by_budget(
    success: Mapping[str, bool], spent_on: Mapping[str, float], points: int = POINTS
) -> BudgetCurve:
    """Share of the examples that had succeeded within a budget, at up to `points` budgets.

    An attack that does not stop at success has spent its whole budget on every example: its curve is a single
    step.
    """
    needed = sorted(spent_on[key] for key, succeeded in success.items() if succeeded)
    if not needed:
        return BudgetCurve([], [])
    places = {min(len(needed) - 1, (i + 1) * len(needed) // points) for i in range(points)} | {0}
    grid = sorted({float(needed[place]) for place in places})
    return BudgetCurve(grid, [sum(cost <= budget for cost in needed) / len(success) for budget in grid])


def cross_flags(success: Mapping[str, Mapping[str, bool]], with_gradients: set[str]) -> dict[str, int]:
    """Signs that show only between attacks (after Carlini et al. 2019 and AutoAttack).

    `black_box_beats_white_box`: examples that an attack without gradients breaks although every attack with
    gradients fails. {} where either kind is missing.
    """
    white = [own for name, own in success.items() if name in with_gradients]
    black = [own for name, own in success.items() if name not in with_gradients]
    shared = worst_case([*white, *black])
    if not white or not black or not shared:
        return {}
    strong, weak = worst_case(white), worst_case(black)
    return {"black_box_beats_white_box": sum(weak[key] and not strong[key] for key in shared)}
