"""Means with their n and a normal interval, as a torchmetric that adds up over processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from callbacks.metrics.rates import Z_95


class Mean(Metric):
    """Mean of per-example values.

    `compute()` gives {"rate", "low", "high", "n"} like Rate, with mean +- 1.96 s / sqrt(n), s the sample
    standard deviation. With n = 0 all three are NaN; with n = 1 the interval is the value itself.
    """

    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squares"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add (B,) values."""
        values = values.double()
        self.total += values.sum()
        self.squares += (values**2).sum()
        self.count += values.numel()

    def compute(self) -> dict[str, float]:
        n = int(self.count)
        if n == 0:
            return {"rate": math.nan, "low": math.nan, "high": math.nan, "n": 0}
        mean = self.total.item() / n
        variance = max(0.0, self.squares.item() / n - mean**2) * n / max(1, n - 1)
        half = Z_95 * math.sqrt(variance / n) if n > 1 else 0.0
        return {"rate": mean, "low": mean - half, "high": mean + half, "n": n}
