"""How precisely products of fp32 matrices are computed while a trainer runs."""

from __future__ import annotations

from typing import Literal

import torch
from lightning import Callback, LightningModule, Trainer

from datamodules.fields import checked


@checked
class Float32Products(Callback):
    """Sets torch's precision of fp32 products for `fit`, `test` and the like, and puts it back behind them.

    Args:
        precision: highest: fp32. high: TF32 where a GPU has it (10 bits of mantissa), several times as fast;
            a CPU may do the same. What is computed in bf16 anyway, and in 4 bits, stays as it is.
    """

    def __init__(self, precision: Literal["highest", "high"] = "high") -> None:
        self.precision = precision
        self._before: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: ValueError beside another one that says otherwise."""
        # Two files may each add one; the second would take what the first has set for what was before.
        given: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        first, *others = [own for own in given if isinstance(own, Float32Products)]
        if any(own.precision != first.precision for own in others):
            raise ValueError(
                f"trainer.callbacks: expected one precision of {type(self).__name__}, got "
                f"{sorted({own.precision for own in (first, *others)})}; leave one of them out"
            )
        if self is not first:
            return
        if self._before is None:
            self._before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._put_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_back()  # nothing is torn down then

    def _put_back(self) -> None:
        if self._before is not None:
            torch.set_float32_matmul_precision(self._before)
            self._before = None
