"""Ordinary supervised fine-tuning on the utility stream: how the packaged tiny model was made, and any SFT
stage."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from datamodules.batch import TrainingBatch, UtilityBatch
from lightning_modules.base import FineTuning
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.models.passes import PassCounter
from lightning_modules.scoring import score_utility


class SupervisedFineTuning(FineTuning):
    """Minimises the mean per-example cross-entropy of the replies; harmful rows in the batch are an error."""

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch. Raises: ValueError if the batch has harmful rows or no utility rows."""
        if batch.adversarial is not None or batch.utility is None:
            raise ValueError("SupervisedFineTuning expects utility rows only; set data.harmful_per_step: 0")
        with PassCounter() as passes:
            loss = self.language_model.outer_pass(partial(self._loss, batch.utility))
        self.log("train/loss", loss.detach(), on_step=True, prog_bar=True, batch_size=1, sync_dist=True)
        return {"loss": loss, "passes": passes}

    def _loss(self, rows: UtilityBatch) -> Tensor:
        return mean_cross_entropy(*score_utility(self.language_model, rows)).mean()
