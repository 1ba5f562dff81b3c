"""Save the trained model in its own library's format: PEFT adapters, or the whole model where all weights
learned."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from callbacks.run_folder.folder import RunError, RunFolder
from datamodules.fields import Count, checked
from lightning_modules.pretrained import PretrainedModel


@checked
class ExportModel(Callback):
    """Writes `model/` in the run folder (weights and tokenizer), loadable by PeftModel or
    AutoModelForCausalLM.from_pretrained.

    Args:
        every_n_steps: also export `model_step_<N>/` every so many optimiser steps; null exports at the end
            only.
        folder: folder to write to instead of the run folder's `model/`.
    """

    def __init__(self, every_n_steps: Count | None = None, folder: str | None = None) -> None:
        self.every_n_steps = every_n_steps
        self.folder = folder
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # Several batches end at one step where gradients are accumulated.
        if self.every_n_steps is not None and step != self._last_step and step % self.every_n_steps == 0:
            self._last_step = step
            self._save(trainer, pl_module, Path(trainer.default_root_dir) / f"model_step_{step:06d}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = RunFolder.of(trainer.default_root_dir).model
        self._save(trainer, pl_module, Path(self.folder) if self.folder else own)

    def _save(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        assert isinstance(pl_module, PretrainedModel)
        if not trainer.is_global_zero:
            return
        # A kill while writing must not leave half a model under the final name.
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model: PreTrainedModel = pl_module.model  # type: ignore[assignment]
        try:
            model.save_pretrained(partial)
            pl_module.language_model.chat.tokenizer.save_pretrained(partial)
            before = folder.with_name(folder.name + ".before")
            shutil.rmtree(before, ignore_errors=True)
            if folder.exists():
                folder.rename(before)  # a kill here leaves both models whole, under other names
            partial.rename(folder)
            shutil.rmtree(before, ignore_errors=True)
        except Exception as error:  # each library has its own kind for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"{folder}: cannot write the trained model ({type(error).__name__}: {str(error)[:120]}); its "
                "checkpoint is kept: make room, then run again with --ckpt_path last"
            ) from error
