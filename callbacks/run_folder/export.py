"""Save the trained model in its own library's format: PEFT adapters, the whole model where all weights
learned, or a whole model with the adapters merged into its weights; each with a filled model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard
from lightning import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from callbacks.report.model_card import TAG, model_card
from callbacks.run_folder.folder import RunError, RunFolder
from callbacks.run_folder.provenance import write_whole
from datamodules.fields import Count, checked
from lightning_modules.models.loading import has_adapter
from lightning_modules.models.merging import merged_copy
from lightning_modules.pretrained import PretrainedModel

CARD = "README.md"
RESUME = "its checkpoint is kept: make room, then run again with --ckpt_path last"


@checked
class ExportModel(Callback):
    """Writes `model/` in the run folder (weights, tokenizer and model card), loadable by PeftModel or
    AutoModelForCausalLM.from_pretrained.

    Args:
        every_n_steps: also export `model_step_<N>/` every so many optimiser steps; null exports at the end
            only.
        folder: folder to write to instead of the run folder's `model/`; what it holds is replaced, so it must
            be new, empty or an earlier export.
        merged: where adapters learned, write at the end `model_merged/` too (`<folder>_merged`): the whole
            model with the adapters merged into its weights, which needs no PEFT.
    """

    def __init__(
        self, every_n_steps: Count | None = None, folder: str | None = None, merged: bool = False
    ) -> None:
        self.every_n_steps = every_n_steps
        self.folder = folder
        self.merged = merged
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: RunError where the folder holds something else than an exported model: it would be lost."""
        if self.folder is None or stage != "fit":
            return
        for folder in (self.folder, *([f"{self.folder}_merged"] if self.merged else [])):
            refuse_foreign(Path(folder), Path(trainer.default_root_dir), "ExportModel.folder")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # Several batches end at one step where gradients are accumulated.
        if self.every_n_steps is not None and step != self._last_step and step % self.every_n_steps == 0:
            self._last_step = step
            self._save(trainer, pl_module, Path(trainer.default_root_dir) / f"model_step_{step:06d}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for folder, merged in self._places(trainer, pl_module):
            self._save(trainer, pl_module, folder, merged)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Evaluations may have ended after the export: the card tells all of them.
        assert isinstance(pl_module, PretrainedModel)
        for folder, merged in self._places(trainer, pl_module) if trainer.is_global_zero else ():
            write_whole(folder.resolve() / CARD, _card(pl_module, trainer, merged))

    def _places(self, trainer: Trainer, pl_module: LightningModule) -> list[tuple[Path, bool]]:
        """Where the model is written at the end, and whether merged."""
        assert isinstance(pl_module, PretrainedModel)
        run = RunFolder.of(trainer.default_root_dir)
        found = [(Path(self.folder) if self.folder else run.model, False)]
        if self.merged and has_adapter(pl_module.model):
            found.append((Path(f"{self.folder}_merged") if self.folder else run.merged, True))
        return found

    def _save(self, trainer: Trainer, pl_module: LightningModule, folder: Path, merged: bool = False) -> None:
        assert isinstance(pl_module, PretrainedModel)
        module = pl_module.whole()
        if trainer.is_global_zero:
            save_model(module, folder, _card(module, trainer, merged), merged)


def save_model(
    module: PretrainedModel, folder: Path, card: str, merged: bool = False, remedy: str = RESUME
) -> None:
    """Write weights, tokenizer and card; a kill leaves a whole model, at worst between two renames, beside
    the folder (`.before`, `.partial`).

    Args:
        module: holds the model; it is not changed.
        folder: what it holds is replaced.
        card: the model card.
        merged: merge adapters into the weights.
        remedy: what to do where it cannot be written.

    Raises: RunError where the model cannot be merged or written.
    """
    folder = folder.resolve()  # a link to a larger disk stays one
    # A kill while writing must not leave half a model under the final name.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model = merged_copy(module.model) if merged else cast(PreTrainedModel, module.model)
    except ValueError as error:
        raise RunError(f"{folder}: {error}") from error
    try:
        model.save_pretrained(partial)
        module.language_model.chat.tokenizer.save_pretrained(partial)
        write_whole(partial / CARD, card)
        before = folder.with_name(folder.name + ".before")
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            folder.rename(before)  # a kill here leaves both models whole, under other names
        partial.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    except Exception as error:  # each library has its own kind for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"{folder}: cannot write the trained model ({type(error).__name__}: {str(error)[:120]}); {remedy}"
        ) from error


def refuse_foreign(folder: Path, run: Path, field: str) -> None:
    """Raises: RunError naming the field where the folder holds something else than an exported model."""
    place, run = folder.resolve(), run.resolve()
    if place == run or place in run.parents:
        raise RunError(f"{field}: {folder} holds the run itself; name a folder of its own")
    held = sorted(place.iterdir()) if place.is_dir() else []
    exported = is_export(place)
    if place.is_file() or (held and not exported) or any(path.is_dir() for path in held):
        raise RunError(
            f"{field}: {folder} is no earlier export (it holds "
            f"{held[0].name if held else 'a file'}) and would be replaced; name another folder"
        )


def is_export(folder: Path) -> bool:
    """Whether the folder's card says that it was exported from a run. A model of another origin may lie in
    one that looks alike, and be what the adapters need."""
    try:
        card = ModelCard.load(folder / CARD, ignore_metadata_errors=True)
    except (OSError, ValueError):
        return False
    return TAG in (card.data.tags or [])


def kind_of(module: PretrainedModel, merged: bool) -> str:
    """What an export holds, as the card calls it."""
    return "adapters" if has_adapter(module.model) and not merged else "whole"


def _card(module: PretrainedModel, trainer: Any, merged: bool) -> str:
    return model_card(trainer.default_root_dir, trainer.global_step, kind_of(module, merged), merged)
