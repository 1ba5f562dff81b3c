"""Rates over several seeds that judge the same examples: intervals for both kinds of chance, differences
between two methods, and the mean of the worst of several groups of examples.

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

from callbacks.metrics.estimates import wilson_interval

Outcomes = Bool[NDArray[np.bool_], "seed example"]
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
        return "not distinguishable"


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


def stacked(by_seed: Sequence[dict[str, bool]]) -> Outcomes:
    """Outcomes of several seeds as one table of the examples that all of them have. Raises: ValueError where
    there is none."""
    shared = sorted(set.intersection(*(set(own) for own in by_seed)))
    if not shared:
        raise ValueError("expected examples that every seed has judged, got none")
    return np.array([[own[key] for key in shared] for own in by_seed], dtype=bool)
