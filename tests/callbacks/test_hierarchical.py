"""Rates over seeds: both kinds of chance count, and nothing is certain because it never happened."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import nct, t, ttest_1samp, ttest_ind

from callbacks.metrics.estimates import paired_difference, wilson_interval
from callbacks.metrics.hierarchical import (
    SeedDifference,
    SeedRate,
    paired_rates,
    paired_values,
    seed_difference,
    seed_rate,
    stacked,
    student,
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


def test_with_one_seed_each_pairs_are_those_of_the_textbooks() -> None:
    generator = np.random.default_rng(2)
    before, after = generator.normal(size=(1, 12)), generator.normal(0.5, 1, size=(1, 12))
    found = paired_values(before, after)
    expected = ttest_1samp((after - before)[0], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    one, other = generator.random((1, 30)) < 0.7, generator.random((1, 30)) < 0.3
    rates = paired_rates(one, other)
    known = paired_difference(*({str(i): bool(yes) for i, yes in enumerate(own[0])} for own in (one, other)))
    assert known is not None
    assert (rates.value, rates.low, rates.high) == pytest.approx((known.difference, known.low, known.high))


def test_seeds_alone_are_compared_as_welch_does() -> None:
    """Every example says the same, so that seeds are all the chance that there is."""
    first, second = np.array([[0.1], [0.4], [0.3]]), np.array([[0.9], [0.6]])
    found = paired_values(np.tile(first, 40), np.tile(second, 40))
    expected = ttest_ind(second[:, 0], first[:, 0], equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx(0.75 - 0.8 / 3)


@pytest.mark.parametrize("degrees", [2, 5, 11, 60])
def test_what_could_have_been_shown_is_found_in_four_of_five_repetitions(degrees: int) -> None:
    found = student(0.0, [(4.0, degrees)])  # a standard error of 2
    power = nct.sf(t.ppf(0.975, degrees), degrees, found.detectable / 2.0)
    assert power == pytest.approx(0.8, abs=0.04)


def test_a_training_with_one_seed_varies_as_the_other_one_does_and_a_model_as_it_is_does_not() -> None:
    """Seeds at 0.2 and 0.6: s^2 = 0.08, of their mean 0.04; of one more seed 0.08 beside it."""
    one, two = np.full((1, 50), 0.5), np.array([[0.2], [0.6]]).repeat(50, axis=1)
    half = 12.7062 * np.array([0.04, 0.04 + 0.08]) ** 0.5
    fixed, trained = paired_values(one, two, (True, False)), paired_values(one, two)
    assert [own.high - own.value for own in (fixed, trained)] == pytest.approx(half, rel=1e-4)
    turned = paired_values(two, one, (False, True))
    assert (turned.low, turned.high) == pytest.approx((-fixed.high, -fixed.low))
    # Nothing at all would have been told of rates.
    assert paired_rates(one > 0.4, two > 0.4).detectable == np.inf
    assert paired_values(one[:, :1], two[:, :1]).verdict(0.05) == "not distinguishable"


def test_what_is_hard_for_both_is_no_chance_of_their_difference() -> None:
    """30 of 60 examples are hopeless for both: joined from two rates, the second's gain is lost in them."""
    first = np.array([[False] * 30 + [True] * 15 + [False] * 15] * 3)
    second = np.array([[False] * 30 + [True] * 30] * 3)
    found = paired_rates(first, second)
    joined = seed_difference(seed_rate(first), seed_rate(second))
    assert found.value == joined.value == 0.25
    assert joined.verdict(0.05) == "not distinguishable" or joined.low < found.low
    assert found.verdict(0.05) == "higher"
    assert found.high - found.low < 0.8 * (joined.high - joined.low)


def test_pairs_of_several_seeds_are_never_certain() -> None:
    for first, second in ((True, True), (False, True)):
        found = paired_rates(np.full((3, 40), first), np.full((2, 40), second))
        one = paired_rates(np.full((1, 40), first), np.full((1, 40), second))
        assert (found.low, found.high) == (one.low, one.high)
        assert found.high - found.low > 0.05
    alike = np.array([[True] * 20 + [False] * 20] * 2)
    apart = np.array([[True] * 40, [False] * 40])
    assert paired_rates(alike, apart).low == -1.0
    assert paired_rates(alike, apart).high == 1.0


@pytest.mark.parametrize(
    ("seeds", "spread", "least"),
    [
        ((3, 3), 0.1, 0.95),
        ((3, 3), 0.8, 0.93),
        ((2, 3), 0.8, 0.91),
        ((1, 3), 0.3, 0.93),
        ((1, 3), 0.8, 0.9),
        ((1, 2), 0.3, 0.91),
        ((2, 2), 0.8, 0.9),
    ],
)
def test_pairs_cover_as_often_as_they_say(seeds: tuple[int, int], spread: float, least: float) -> None:
    """Logits of seeds and of examples, the examples' shared by both sides: 200 studies, a standard error of
    1.5 points. A bootstrap of two or three seeds as far apart as 0.8 covers 81 to 88 %."""
    generator, covered, repetitions = np.random.default_rng(3), 0, 200

    def drawn(middle: float, number: int, hard: np.ndarray) -> np.ndarray:
        own = middle + generator.normal(0, spread, size=(number, 1)) + hard[None]
        return generator.random(own.shape) < 1 / (1 + np.exp(-own))

    every = generator.normal(0, np.hypot(spread, 2.0), size=200_000)
    low, high = (float((1 / (1 + np.exp(-(middle + every)))).mean()) for middle in (0.0, 1.0))
    for _ in range(repetitions):
        hard = generator.normal(0, 2.0, size=60)
        found = paired_rates(drawn(0.0, seeds[0], hard), drawn(1.0, seeds[1], hard))
        covered += found.low <= high - low <= found.high
    assert covered >= least * repetitions


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
