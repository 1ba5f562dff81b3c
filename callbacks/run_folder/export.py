"""Save the trained model in its own library's format: PEFT adapters, or the whole model where all weights
learned."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from datamodules.evaluation import EvaluationData
from lightning_modules.base import FineTuning


class ExportModel(Callback):
    """Writes `model/` in the run folder (weights and tokenizer), loadable by PeftModel or
    AutoModelForCausalLM.from_pretrained.

    Args:
        every_n_steps: also export `model_step_<N>/` every so many optimiser steps; null exports at the end
            only.
        folder: folder to write to instead of the run folder's `model/`.
    """

    def __init__(self, every_n_steps: int | None = None, folder: str | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"ExportModel.every_n_steps: expected >= 1 or null, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.folder = folder
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps is not None and step != self._last_step and step % self.every_n_steps == 0:
            self._last_step = step
            self._save(trainer, pl_module, Path(trainer.default_root_dir) / f"model_step_{step:06d}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(
            trainer, pl_module, Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "model"
        )

    def _save(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        assert isinstance(pl_module, FineTuning)
        if not trainer.is_global_zero:
            return
        # A kill while writing must not leave half a model under the final name.
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model: PreTrainedModel = pl_module.model  # type: ignore[assignment]
        model.save_pretrained(partial)
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, EvaluationData):
            data.chat.tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
