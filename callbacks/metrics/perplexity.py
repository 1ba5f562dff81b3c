"""Perplexities from the scored windows of a text with block bootstrap intervals, and their paired difference.

    perplexity = exp( sum_w nats_w / sum_w units_w ),   w over windows, units: tokens, words or bytes

Per word and per byte the number of units does not depend on the tokenizer, so that models with different ones
can be compared; per token they cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from callbacks.metrics.estimates import Estimate

RESAMPLES, SEED = 4999, 0


def perplexity(nats: Sequence[float], units: Sequence[int]) -> Estimate:
    """exp of the nats per unit, n the number of windows; NaN without a unit, or where a window has no number.

    The interval is the percentile one of a circular block bootstrap (Politis and Romano 1992): blocks of
    ceil(n^(1/3)) consecutive windows are drawn, since neighbours are of one article and alike.

    Args:
        nats: negative log-likelihood of every window's scored tokens, in the text's order; NaN where unknown.
        units: what every window's scored tokens spell, counted in tokens, words or bytes.
    """
    n, scores, counts = len(nats), np.asarray(nats, dtype=float), np.asarray(units, dtype=float)
    if not counts.sum() or np.isnan(scores).any():
        return Estimate(math.nan, math.nan, math.nan, n, "perplexity")
    low, high = np.quantile(_ratios(scores, counts, _draws(n)), (0.025, 0.975))
    with np.errstate(over="ignore"):
        value = np.exp(scores.sum() / counts.sum())
        return Estimate(float(value), float(np.exp(low)), float(np.exp(high)), n, "perplexity")


def perplexity_difference(
    before: Sequence[float], after: Sequence[float], units: Sequence[int]
) -> tuple[float, float, float]:
    """after - before of two perplexities on the same windows: (difference, low, high).

    Every resample takes the same windows of both, so that what makes a window hard for either cancels.
    """
    scores = [np.asarray(nats, dtype=float) for nats in (before, after)]
    counts = np.asarray(units, dtype=float)
    if not counts.sum() or np.isnan(scores).any():
        return math.nan, math.nan, math.nan
    draws = _draws(len(counts))
    with np.errstate(over="ignore", invalid="ignore"):
        values = [np.exp(own.sum() / counts.sum()) for own in scores]
        resampled = [np.exp(_ratios(own, counts, draws)) for own in scores]
        low, high = np.quantile(resampled[1] - resampled[0], (0.025, 0.975))
        return float(values[1] - values[0]), float(low), float(high)


def _draws(n: int) -> NDArray[np.int64]:
    """Window numbers of every resample, (RESAMPLES, n)."""
    length = math.ceil(n ** (1 / 3))
    starts = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, math.ceil(n / length)))
    blocks = (starts[:, :, None] + np.arange(length)) % n
    return blocks.reshape(RESAMPLES, -1)[:, :n]


def _ratios(
    scores: NDArray[np.float64], counts: NDArray[np.float64], draws: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Nats per unit of every resample; a resample without a unit says nothing and is left out."""
    total = counts[draws].sum(1)
    ratios: NDArray[np.float64] = scores[draws].sum(1)[total > 0] / total[total > 0]
    return ratios
