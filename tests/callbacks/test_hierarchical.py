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
    tail_rate,
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


def test_the_worst_quarter_by_hand() -> None:
    of = {
        name: np.array([[True] * k + [False] * (10 - k)])
        for name, k in zip("abcde", (1, 5, 9, 3, 2), strict=True)
    }
    # A quarter of five is two: 90 and 50 %, or 10 and 20 %.
    assert tail_rate(of, 0.25, highest=True).value == pytest.approx(0.7)
    assert tail_rate(of, 0.25, highest=False).value == pytest.approx(0.15)
    assert tail_rate(of, 0.2, highest=True).num_examples == 50
    # 5 of 10 and certain zeros: a draw is Binomial(10, 1/2) / 10, whose 2.5 and 97.5 % points are 2 and 8
    # (P(X <= 1) = 0.011, P(X <= 2) = 0.055); Wilson's interval, [0.24, 0.76], lies within.
    one = {"half": np.array([[True, False] * 5]), "never": np.zeros((1, 10), bool)}
    found = tail_rate(one, 0.25, highest=True)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.2, 0.8))


def test_the_worst_groups_are_found_anew_in_every_draw() -> None:
    # The highest of four Binomial(10, 1/2) is at most 8 with 0.989^4 = 0.957, at most 9 with 0.996; one
    # group chosen beforehand would end at 8. Below, that group's own 2 reaches further than the highest's 4.
    found = tail_rate({name: np.array([[True, False] * 5]) for name in "abcd"}, 0.25, highest=True)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.2, 0.9))


def test_the_worst_quarter_counts_seeds_and_what_never_happened() -> None:
    # One seed always, one never: their mean is 0, 1/2 or 1 with 1/4, 1/2 and 1/4, the same for all groups.
    apart = {name: np.array([[True] * 30, [False] * 30]) for name in "abcd"}
    found = tail_rate(apart, 0.25, highest=True)
    assert (found.value, found.low, found.high, found.by_seed) == (0.5, 0.0, 1.0, (1.0, 0.0))
    # Nothing of 10 happened in 8 groups, of which two are the worst: sqrt(2) z^2 / (10 + z^2) / 2.
    never = {name: np.zeros((3, 10), bool) for name in "abcdefgh"}
    found = tail_rate(never, 0.25, highest=True)
    assert (found.value, found.low) == (0.0, 0.0) and found.high == pytest.approx(0.2775 / 2**0.5, abs=1e-4)


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
