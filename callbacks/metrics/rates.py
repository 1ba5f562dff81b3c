"""Rates with their n and a Wilson interval, as a torchmetric that adds up over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


class Rate(Metric):
    """Share of successes.

    `compute()` gives {"rate", "low", "high", "n"}: the share, its 95 % Wilson interval and the number of
    trials. With n = 0 the rate is NaN and the interval [0, 1].
    """

    successes: Tensor
    trials: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("successes", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("trials", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outcomes: Tensor) -> None:
        """Add (B,) bool outcomes."""
        self.successes += outcomes.bool().sum().to(self.successes)
        self.trials += outcomes.numel()

    def compute(self) -> dict[str, float]:
        successes, trials = int(self.successes), int(self.trials)
        low, high = wilson_interval(successes, trials)
        return {"rate": successes / trials if trials else math.nan, "low": low, "high": high, "n": trials}


def rates_by_name(names: Iterable[str], device: torch.device) -> dict[str, Rate]:
    """A rate per distinct name, sorted; each can be computed, and takes part in adding up, before its first
    trial."""
    rates = {name: Rate().to(device) for name in sorted(set(names))}
    for rate in rates.values():
        rate.update(torch.empty(0, dtype=torch.bool, device=device))
    return rates


def wilson_interval(successes: float, trials: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a binomial share (Wilson 1927).

    centre = (p + z^2 / 2n) / (1 + z^2 / n),  half-width = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 /
    4n^2)
    """
    if trials == 0:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high
