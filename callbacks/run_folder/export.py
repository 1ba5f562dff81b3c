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
        folder: folder to write to instead of the run folder's `model/`; what it holds is replaced, so it must
            be new, empty or an earlier export.
    """

    def __init__(self, every_n_steps: Count | None = None, folder: str | None = None) -> None:
        self.every_n_steps = every_n_steps
        self.folder = folder
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: RunError where the folder holds something else than an exported model: it would be lost."""
        if self.folder is None or stage != "fit":
            return
        place, run = Path(self.folder).resolve(), Path(trainer.default_root_dir).resolve()
        if place == run or place in run.parents:
            raise RunError(
                f"ExportModel.folder: {self.folder} holds the run itself; name a folder of its own"
            )
        held = sorted(place.iterdir()) if place.is_dir() else []
        exported = {"config.json", "adapter_config.json"} & {path.name for path in held}
        if place.is_file() or (held and not exported) or any(path.is_dir() for path in held):
            raise RunError(
                f"ExportModel.folder: {self.folder} is no earlier export (it holds "
                f"{held[0].name if held else 'a file'}) and would be replaced; name another folder"
            )

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
        folder = folder.resolve()  # a link to a larger disk stays one
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
