"""Shares and means with n and a 95 % interval, and the paired difference of two shares, from plain values.

Everything is computed from the rows at once: there is no state to add up over batches or processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from scipy.stats import binomtest

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A share (Wilson interval), a mean (normal interval) or a perplexity (block bootstrap,
    metrics/perplexity.py) over n examples, with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    kind: Literal["rate", "mean", "perplexity"] = "rate"


@dataclass(frozen=True)
class Difference:
    """after - before of a share on the same n examples."""

    difference: float
    low: float
    high: float
    n: int
    gained: int
    """Examples with the event after and not before."""
    lost: int
    """Examples with the event before and not after."""
    p_value: float
    """Exact McNemar: two-sided binomial on gained against lost."""

    @property
    def reversed(self) -> Difference:
        """before - after: the method has no direction."""
        return Difference(
            0.0 - self.difference,  # no -0.0
            0.0 - self.high,
            0.0 - self.low,
            self.n,
            self.lost,
            self.gained,
            self.p_value,
        )


@lru_cache(maxsize=1 << 16)  # Pages of many runs ask for few counts again and again.
def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson score interval of a binomial share (Wilson 1927), SciPy's; [0, 1] without trials.

    successes: 0 to trials, not whole where they are a mean over seeds (hierarchical.py).
    """
    if trials == 0:
        return 0.0, 1.0
    result = binomtest(0, trials, p=0.0)  # The test itself is not asked for; at p = 0 it costs least.
    result.k = successes  # binomtest takes whole numbers alone, the interval of its result any.
    interval = result.proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def rate(outcomes: Sequence[bool]) -> Estimate:
    """The share of outcomes that are true, with its Wilson interval; NaN and [0, 1] without any."""
    successes, trials = sum(outcomes), len(outcomes)
    return Estimate(successes / trials if trials else math.nan, *wilson_interval(successes, trials), trials)


def pooled_standard_error(shares: Sequence[float], sizes: Sequence[int]) -> float:
    """Standard error of the share over several tasks' examples together, as lm-evaluation-harness pools it:
    root of (sum of n_i s_i^2 over N - k) / N, where (n_i - 1) s_i^2 = n_i p_i (1 - p_i). Of one task that
    is the sample's own, s / sqrt(n).

    Differences between tasks are left out, so it is smaller than that of all examples as one sample. A task
    of one example, of which the harness has no error, adds nothing but itself. NaN where no task has two.
    """
    spread = sum(sizes) - len(sizes)
    if spread == 0:
        return math.nan
    squares = math.fsum(n * share * (1 - share) for share, n in zip(shares, sizes, strict=True))
    return math.sqrt(squares / spread / sum(sizes))


def mean(values: Sequence[float]) -> Estimate:
    """Mean +- 1.96 s / sqrt(n), s the sample standard deviation; the value itself with n = 1, NaN with 0."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, "mean")
    centre = math.fsum(values) / n
    variance = math.fsum((value - centre) ** 2 for value in values) / max(1, n - 1)
    half = Z_95 * math.sqrt(variance / n)
    return Estimate(centre, centre - half, centre + half, n, "mean")


def mean_difference(before: Mapping[str, float], after: Mapping[str, float]) -> Estimate | None:
    """Mean of after - before over the examples that both have, with its normal interval; None without any."""
    shared = sorted(before.keys() & after.keys())
    return mean([after[key] - before[key] for key in shared]) if shared else None


def paired_difference(before: Mapping[str, bool], after: Mapping[str, bool]) -> Difference | None:
    """The difference over the examples that both have, None where there are none.

    The interval is Newcombe's for paired shares (Newcombe 1998, Statistics in Medicine 17:2635, method 10:
    score intervals of both shares, joined with their corrected correlation); the p value is exact.
    """
    shared = before.keys() & after.keys()
    if not shared:
        return None
    n = len(shared)
    pairs = [(before[key], after[key]) for key in shared]
    both, gained = sum(b and a for b, a in pairs), sum(a and not b for b, a in pairs)
    lost = sum(b and not a for b, a in pairs)
    p_value = exact_mcnemar(gained, lost)
    low, high = newcombe_interval(both, gained, lost, n - both - gained - lost)
    return Difference((gained - lost) / n, low, high, n, gained, lost, p_value)


@lru_cache(maxsize=4096)  # Many runs side by side ask for few pairs of counts again and again.
def exact_mcnemar(gained: int, lost: int) -> float:
    """Two-sided binomial p of the pairs that disagree; 1 without any."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def newcombe_interval(both: float, gained: float, lost: float, neither: float) -> tuple[float, float]:
    """95 % interval of p_after - p_before from the four counts of paired outcomes (method 10), which are not
    whole where they are means over seeds (hierarchical.py).

    Written out: SciPy has no interval of a difference of shares, statsmodels one of independent shares alone.
    """
    n = round(both + gained + lost + neither)
    # Sums of parts may exceed the whole by a rounding.
    now, then = min(both + gained, n), min(both + lost, n)
    after, before = now / n, then / n
    low_after, high_after = wilson_interval(now, n)
    low_before, high_before = wilson_interval(then, n)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    agreement = float(both * neither - gained * lost)
    if agreement > 0:
        agreement = max(agreement - n / 2, 0.0)
    phi = agreement / math.sqrt(margins) if margins else 0.0

    def half(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up**2 - 2 * phi * up * down + down**2))

    difference = after - before
    return (
        difference - half(after - low_after, high_before - before),
        difference + half(high_after - after, before - low_before),
    )
