"""Rates over seeds: both kinds of chance count, and nothing is certain because it never happened."""

from __future__ import annotations

import numpy as np
import pytest

from callbacks.metrics.estimates import wilson_interval
from callbacks.metrics.hierarchical import (
    SeedDifference,
    SeedRate,
    seed_difference,
    seed_rate,
    stacked,
)


def test_seeds_that_differ_widen_the_interval() -> None:
    alike = np.array([[True] * 20 + [False] * 20] * 3)
    apart = np.array([[True] * 40, [False] * 40, [True] * 20 + [False] * 20])
    a, b = seed_rate(alike), seed_rate(apart)
    assert a.value == b.value == 0.5
    assert b.high - b.low > 1.5 * (a.high - a.low)
    assert b.by_seed == (1.0, 0.0, 0.5)
    # No narrower than one seed's n, however many seeds say the same.
    assert a.low <= wilson_interval(20, 40)[0] and a.high >= wilson_interval(20, 40)[1]


@pytest.mark.parametrize("value", [False, True])
def test_what_never_and_what_always_happened_has_an_interval(value: bool) -> None:
    found = seed_rate(np.full((3, 53), value))
    assert (found.low, found.high) == wilson_interval(53 * value, 53)


def test_the_interval_covers_as_often_as_it_says() -> None:
    # Seeds with rates of their own around 0.4, examples drawn per study: 95 % of 60 studies, less chance.
    generator, covered = np.random.default_rng(1), 0
    for _ in range(60):
        chances = np.clip(generator.normal(0.4, 0.05, size=3), 0, 1)
        outcomes = generator.random((3, 60)) < chances[:, None]
        found = seed_rate(outcomes)
        covered += found.low <= 0.4 <= found.high
    assert covered >= 54


def test_a_difference_by_hand() -> None:
    first, second = SeedRate(0.5, 0.4, 0.6, (0.5,), 100), SeedRate(0.8, 0.7, 0.85, (0.8,), 100)
    found = seed_difference(first, second)
    # 0.3 - sqrt(0.1^2 + 0.1^2) and 0.3 + sqrt(0.05^2 + 0.1^2)
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - 0.1414214)
    assert found.high == pytest.approx(0.3 + 0.1118034)
    # Half-width 0.1414 is 1.96 standard errors; 80 % power needs 1.96 + 0.8416 of them.
    assert found.detectable == pytest.approx(0.1414214 * (1.959964 + 0.8416212) / 1.959964)
    assert found.verdict(0.05) == "higher"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.3, -0.1, "lower"),
        (-0.04, 0.03, "equivalent"),
        (-0.04, 0.2, "not distinguishable"),
        (0.01, 0.02, "higher"),
    ],
)
def test_close_is_said_by_a_margin_alone(low: float, high: float, expected: str) -> None:
    assert SeedDifference((low + high) / 2, low, high, 0.1).verdict(0.05) == expected


def test_only_examples_that_every_seed_has_are_compared() -> None:
    table = stacked([{"a": True, "b": False, "c": True}, {"b": True, "c": False, "d": True}])
    assert table.tolist() == [[False, True], [True, False]]
    with pytest.raises(ValueError, match="got none"):
        stacked([{"a": True}, {"b": True}])
