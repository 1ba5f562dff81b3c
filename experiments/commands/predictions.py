"""The replies of `thundercat predict` as a file."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from callbacks.run_folder.folder import RunError
from datamodules.batch import EvaluationBatch
from datamodules.line_files import append_lines, whole_lines
from datamodules.settings import contents, settings_digest
from lightning_modules.models.fingerprint import fingerprint
from lightning_modules.pretrained import PretrainedModel

NAME, PART = "predictions.jsonl", "predictions_rank{}.jsonl.partial"
log = logging.getLogger(__name__)


class WritesPredictions(Callback):
    """Appends {key, prompt, reply, cut, checkpoint} rows, a batch a line, to a file of each process as they
    come; at the end they are `predictions.jsonl` in the run folder, a row a line, and only then is an earlier
    one replaced.

    After a kill the same command goes on behind the last whole batch: where the same model is asked the same
    in the same way, which the file's first line and each of its batches say by a digest. What is there of
    another call is dropped, and said.

    Args:
        checkpoint: the checkpoint that replies, None for the model before training.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = None if checkpoint is None else checkpoint.name
        self.written: Path | None = None
        """The finished file; null where there was no prompt."""
        self._part = Path()
        self._lines = 0
        """Of the file: how many are of this call."""
        self._there: list[dict[str, Any]] = []
        """Batches of an earlier call that are not yet asked for."""
        self._asked = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._part = _part(trainer, trainer.global_rank)
        self._part.parent.mkdir(parents=True, exist_ok=True)
        first = {"by": self._replies_by(trainer, pl_module)}
        found = _records(self._part)
        self._there, self._lines = found[1:], 1
        if found and found[0] == first and first["by"] is not None:
            self._keep(len(found))
            log.info("%d batches are there already: going on behind them", len(self._there))
            return
        if found:
            self._drop("another model, or one that replies in another way, gave them")
        self._part.unlink(missing_ok=True)
        append_lines(self._part, [json.dumps(first)])

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(pl_module, PretrainedModel) or not isinstance(batch, EvaluationBatch):
            return
        self._asked = settings_digest(contents(batch), list(batch.keys), list(batch.prompts))
        if self._there and self._there[0]["asked"] != self._asked:
            self._drop("they reply to other prompts, or to others at once")
        pl_module.replied = self._there[0]["rows"] if self._there else None

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, list) or not all(isinstance(row, Mapping) for row in outputs):
            raise RunError(
                f"predict: expected predict_step of {type(pl_module).__name__} to return a list of rows "
                f"(mappings), got {type(outputs).__name__}"
            )
        if isinstance(pl_module, PretrainedModel):
            pl_module.replied = None
        self._lines += 1
        if self._there:
            self._there.pop(0)
            return
        rows = [{**row, "checkpoint": self.checkpoint} for row in outputs]
        # ASCII: a reply may hold half a surrogate pair, which no UTF-8 file can.
        append_lines(self._part, [json.dumps({"asked": self._asked, "rows": rows})])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._there:
            self._drop("their prompts are not asked any more")
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            whole = folder / f"{NAME}.partial"
            with whole.open("w", encoding="utf-8") as stream:
                for rank in range(trainer.world_size):
                    for batch in _records(_part(trainer, rank))[1:]:
                        stream.writelines(json.dumps(row) + "\n" for row in batch["rows"])
            self.written = whole.replace(folder / NAME)
            # Of more processes than these, too: an earlier call's.
            for part in folder.glob(PART.format("*")):
                part.unlink()

    def _replies_by(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """What decides a reply besides the prompt, and which prompts are this process's; None of a module
        that replies in a way of its own."""
        if (
            not isinstance(pl_module, PretrainedModel)
            or type(pl_module).predict_step is not PretrainedModel.predict_step
        ):
            return None
        return settings_digest(
            fingerprint(pl_module.model),
            pl_module.base,
            self.checkpoint,
            pl_module.predicted_tokens,
            pl_module.defence,
            str(trainer.precision),
            torch.get_float32_matmul_precision(),
            trainer.world_size,
        )

    def _drop(self, why: str) -> None:
        """Forget what is there and was not asked for again."""
        if self._there:
            log.warning("%s: %d batches are dropped: %s", self._part.name, len(self._there), why)
        self._there = []
        self._keep(self._lines)

    def _keep(self, lines: int) -> None:
        """Cut what stands behind so many lines of the file."""
        kept = itertools.islice(whole_lines(self._part), lines)
        os.truncate(self._part, sum(len(line) + 1 for _, line in kept))


def _records(path: Path) -> list[dict[str, Any]]:
    """Of a file that a killed process may have left: all before a line of another kind."""
    found: list[dict[str, Any]] = []
    for _, line in whole_lines(path) if path.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict) or value.keys() != ({"asked", "rows"} if found else {"by"}):
            break
        found.append(value)
    return found


def _part(trainer: Trainer, rank: int) -> Path:
    return Path(trainer.default_root_dir) / PART.format(rank)
