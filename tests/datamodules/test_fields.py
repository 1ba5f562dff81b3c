"""Fields are checked from their annotations, in one place; messages name the field and what was expected."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from datamodules.fields import Count, Fraction, Positive, Probability, Share, checked, describe, problem


@checked
class Example:
    def __init__(
        self,
        count: Count = 1,
        rate: Share = 0.5,
        cutoff: float | None = None,
        kind: Literal["a", "b"] = "a",
        limits: dict[str, Count] | None = None,
        betas: tuple[Fraction, Fraction] = (0.9, 0.999),
        weights: list[float] | None = None,
        other: Any = None,
    ) -> None:
        self.count = count


@checked
class Derived(Example):
    def __init__(self, more: Positive = 1.0) -> None:
        super().__init__(count=int(more))


class Plain(Example):
    """Inherits its constructor."""


@checked
@dataclass
class Settings:
    lr: Positive = 1e-3
    share: Probability = 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "Example.count: expected an integer >= 1, got 0"),
        ({"count": True}, "Example.count: expected an integer >= 1, got True"),
        ({"count": 1.0}, "Example.count: expected an integer >= 1, got 1.0"),
        ({"rate": 0.0}, r"Example.rate: expected a number within \(0, 1\], got 0.0"),
        ({"rate": math.nan}, "Example.rate: .* got nan"),
        ({"cutoff": math.inf}, "Example.cutoff: expected a finite number or null, got inf"),
        ({"cutoff": 10**400}, "Example.cutoff: expected a finite number or null, got 1000"),
        ({"count": 10**400}, "Example.count: expected an integer >= 1, got 1000"),
        ({"kind": "c"}, "Example.kind: expected 'a' | 'b', got 'c'"),
        ({"limits": {"gcg": -1}}, "Example.limits: gcg: expected an integer >= 1, got -1"),
        ({"betas": (0.9, 1.0)}, "Example.betas: expected"),
        ({"betas": (0.9,)}, "Example.betas: expected"),
        ({"weights": [1.0, math.nan]}, "Example.weights: item 1: expected a finite number, got nan"),
    ],
)
def test_the_first_field_that_does_not_fit_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Example(**fields)


def test_what_fits_passes_and_what_is_not_plain_is_left_alone() -> None:
    assert Example(3, 1, None, "b", {"gcg": 2}, (0, 0.5), [1, 2.5], other=object()).count == 3
    assert problem(object(), object) is None
    assert describe(Count | None) == "an integer >= 1 or null"


def test_dataclasses_and_subclasses() -> None:
    with pytest.raises(ValueError, match="Settings.lr: expected a number > 0, got inf"):
        Settings(lr=math.inf)
    with pytest.raises(ValueError, match="Derived.more: expected a number > 0, got -1"):
        Derived(-1)
    with pytest.raises(ValueError, match="Plain.count: expected an integer >= 1, got 0"):
        Plain(0)
    # What a subclass computes is its own affair; its caller's values are what is checked.
    assert Derived(2).count == 2
    assert list(inspect.signature(Example).parameters)[:2] == ["count", "rate"]
