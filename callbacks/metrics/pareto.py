"""The Pareto front: what nothing else is better than in one number without being worse in the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name", int, str)


def front(points: Mapping[Name, tuple[float, float]], signs: tuple[int, int]) -> list[Name]:
    """The points that no other is at least as good as in both and better in one, by their x.

    Args:
        points: name -> x, y.
        signs: of either axis, 1 where more is better, -1 where less is.
    """
    scored = {name: (signs[0] * x, signs[1] * y) for name, (x, y) in points.items()}
    found = [
        name
        for name, (x, y) in scored.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in scored.values())
    ]
    return sorted(found, key=lambda name: points[name])
