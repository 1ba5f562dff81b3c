"""Rates over several seeds that judge the same examples: intervals for both kinds of chance, and differences
between two methods.

Seeds are few and examples are shared between them, so neither "seeds x examples" independent trials nor one
seed's interval is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.stats import t

from callbacks.metrics.estimates import newcombe_interval, wilson_interval

Outcomes = Bool[NDArray[np.bool_], "seed example"]
Values = Float[NDArray[np.float64], "seed example"]
UNTOLD = "not distinguishable"
DRAWS = 2000
POWER = NormalDist().inv_cdf(0.8)
Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class SeedRate:
    """A rate over seeds and examples."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    """Each seed's own rate: the interval is of their mean, and a single training may lie outside it."""
    num_examples: int


@dataclass(frozen=True)
class SeedDifference:
    """Second rate - first rate."""

    value: float
    low: float
    high: float
    detectable: float
    """The smallest true difference that this n and these seeds would have shown in four of five repetitions
    (80 % power at 5 %, two-sided)."""

    @classmethod
    def of(cls, value: float, low: float, high: float) -> SeedDifference:
        """With the smallest difference that an interval of this width could have shown."""
        half = max(high - value, value - low)
        return cls(value, low, high, half * (Z_95 + POWER) / Z_95)

    def verdict(self, margin: float) -> str:
        """lower, higher, equivalent (all of the interval within the margin), or not distinguishable."""
        if self.high < 0:
            return "lower"
        if self.low > 0:
            return "higher"
        if -margin < self.low and self.high < margin:
            return "equivalent"
        return UNTOLD


def seed_rate(outcomes: Outcomes, rng: int = 0) -> SeedRate:
    """Mean over seeds and examples with a 95 % interval: a bootstrap that draws seeds and examples anew
    (Davison and Hinkley 1997, section 3.8), never narrower than Wilson's interval of one seed's n.

    The bootstrap alone would say [0, 0] where nothing happened, and three seeds resampled say little about
    other seeds.
    """
    seeds, examples = outcomes.shape
    generator = np.random.default_rng(rng)
    chosen = generator.integers(seeds, size=(DRAWS, seeds))
    value = float(outcomes.mean())
    low, high = _bounds(_drawn(outcomes, chosen, generator))
    least, most = wilson_interval(value * examples, examples)
    by_seed = tuple(float(own) for own in outcomes.mean(axis=1))
    return SeedRate(value, min(low, least), max(high, most), by_seed, examples)


def _drawn(
    outcomes: Outcomes, chosen: Int[NDArray[np.int64], "draw seed"], generator: np.random.Generator
) -> Float[NDArray[np.float64], " draw"]:
    """The mean of every draw over the seeds that it chose and over examples drawn anew."""
    examples = outcomes.shape[1]
    # How often each example is drawn: the mean over a draw is a product, not a copy of its outcomes.
    weights = generator.multinomial(examples, np.full(examples, 1 / examples), size=len(chosen))
    rates: Float[NDArray[np.float64], "draw seed"] = weights @ outcomes.T.astype(float) / examples
    means: Float[NDArray[np.float64], " draw"] = np.take_along_axis(rates, chosen, axis=1).mean(axis=1)
    return means


def _bounds(means: Float[NDArray[np.float64], " draw"]) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def seed_difference(first: SeedRate, second: SeedRate) -> SeedDifference:
    """Joined from the two rates' own intervals (Newcombe 1998, Statistics in Medicine 17:873, method 10), as
    if their examples were not the same: on the safe side, since easy examples are easy for both."""
    difference = second.value - first.value
    low = difference - math.hypot(second.value - second.low, first.high - first.value)
    high = difference + math.hypot(second.high - second.value, first.value - first.low)
    return SeedDifference.of(difference, low, high)


Fixed = tuple[bool, bool]
"""Which of two sides is one model as it is, and no draw of a training: its seeds are no chance."""


def paired_values(first: Values, second: Values, fixed: Fixed = (False, False)) -> SeedDifference:
    """Second mean - first mean of the same examples, in the same order, each over its own seeds.

    Student's interval on a sum of variances: of an example's difference, its means over seeds taken, over the
    examples; and of each side's means over its seeds (`seed_terms`). Examples and seeds are crossed random
    effects (Owen 2007, Annals of Applied Statistics 1:386); what is left of a reply beside them counts in all
    terms, on the safe side. With one seed each it is Student's paired interval. One example says nothing of
    others: its interval is infinite. In simulations 95 % cover 93 to 99 % with three seeds a side, and 90 to
    99 % with one beside two or three, and with two (tests/callbacks/test_hierarchical.py): two seeds that
    happen to agree say too much.
    """
    examples = first.shape[1]
    changes = second.mean(axis=0) - first.mean(axis=0)
    value = float(changes.mean())
    if examples < 2:
        return SeedDifference(value, -math.inf, math.inf, math.inf)
    own = (float(changes.var(ddof=1)) / examples, examples - 1)
    return student(value, [own, *seed_terms(first.mean(axis=1), second.mean(axis=1), fixed)])


def seed_terms(
    first: Float[NDArray[np.float64], " seed"],
    second: Float[NDArray[np.float64], " seed"],
    fixed: Fixed = (False, False),
) -> list[tuple[float, int]]:
    """The variances that two sides' seeds add to their difference, each with its degrees of freedom: of both
    sides where both have several (Welch). A side with one seed, which cannot tell its own, is taken to vary
    as the other side does. Nothing where both have one."""
    spread = [(float(own.var(ddof=1)), len(own) - 1) if len(own) > 1 else None for own in (first, second)]
    terms = []
    for side, own in enumerate((first, second)):
        other = spread[1 - side]
        if (known := spread[side]) is not None:
            # One that has no seeds' chance adds none; one that cannot tell it adds as much as this one.
            alone = other is None and not fixed[1 - side]
            terms.append((known[0] * (1 / len(own) + (1 if alone else 0)), known[1]))
    return terms


def student(value: float, terms: Sequence[tuple[float, float]]) -> SeedDifference:
    """A difference whose variance is a sum of independent ones, each with its degrees of freedom: Student's
    interval, its degrees of freedom by Satterthwaite."""
    variance = math.fsum(own for own, _ in terms)
    if variance == 0.0:
        return SeedDifference.of(value, value, value)
    freedom = variance**2 / math.fsum(own**2 / degrees for own, degrees in terms)
    error = math.sqrt(variance)
    half, power = (float(t.ppf(chance, freedom)) * error for chance in (0.975, 0.8))
    return SeedDifference(value, value - half, value + half, half + power)


def paired_rates(first: Outcomes, second: Outcomes, fixed: Fixed = (False, False)) -> SeedDifference:
    """Second rate - first rate of the same examples, each over its own seeds.

    With one seed each, Newcombe's paired interval. With more, that of `paired_values`, never narrower than
    Newcombe's of one seed's n, which no rate of 0 or 1 makes nothing; its four counts are then those expected
    of two seeds drawn from the two sides. No difference exceeds 1: where only a greater one would have been
    found, `detectable` is infinite.
    """
    a, b = first.mean(axis=0), second.mean(axis=0)
    counts = (a * b, (1 - a) * b, a * (1 - b), (1 - a) * (1 - b))
    least, most = newcombe_interval(*(math.fsum(own) for own in counts))
    found = SeedDifference.of(float(b.mean() - a.mean()), least, most)
    if first.shape[1] == 1 or len(first) == len(second) == 1:
        return found
    own = paired_values(first.astype(float), second.astype(float), fixed)
    least, most = max(-1.0, min(least, own.low)), min(1.0, max(most, own.high))
    detectable = max(found.detectable, own.detectable)
    return SeedDifference(found.value, least, most, detectable if detectable <= 1 else math.inf)


def stacked(by_seed: Sequence[dict[str, bool]]) -> Outcomes:
    """Outcomes of several seeds as one table of the examples that all of them have. Raises: ValueError where
    there is none."""
    shared = sorted(set.intersection(*(set(own) for own in by_seed)))
    if not shared:
        raise ValueError("expected examples that every seed has judged, got none")
    return np.array([[own[key] for key in shared] for own in by_seed], dtype=bool)
