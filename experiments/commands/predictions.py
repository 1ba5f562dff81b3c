"""The replies of `thundercat predict` as a file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning import Callback, LightningModule, Trainer

from callbacks.run_folder.folder import RunError
from datamodules.batch import EvaluationBatch
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
        self._stream: TextIO | None = None
        self._kept: list[dict[str, Any]] = []
        """The file's first line and batches that are replied to."""
        self._there: list[dict[str, Any]] = []
        """Batches of an earlier call that are not yet asked for."""
        self._asked = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = _part(trainer, trainer.global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        first = {"by": self._replies_by(trainer, pl_module)}
        found = _whole_lines(path)
        self._kept, self._there = [first], found[1:]
        if found and (found[0] != first or first["by"] is None):
            self._drop(path, "another model, or one that replies in another way, gave them")
        elif self._there:
            log.info("%d batches are there already: going on behind them", len(self._there))
        self._begin(path)

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
            self._drop(
                _part(trainer, trainer.global_rank), "they reply to other prompts, or to others at once"
            )
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
        assert self._stream is not None
        if not isinstance(outputs, list) or not all(isinstance(row, Mapping) for row in outputs):
            raise RunError(
                f"predict: expected predict_step of {type(pl_module).__name__} to return a list of rows "
                f"(mappings), got {type(outputs).__name__}"
            )
        if isinstance(pl_module, PretrainedModel):
            pl_module.replied = None
        if self._there:
            self._kept.append(self._there.pop(0))
            return
        rows = [{**row, "checkpoint": self.checkpoint} for row in outputs]
        self._kept.append({"asked": self._asked, "rows": rows})
        self._stream.write(_line(self._kept[-1]))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._there:
            self._drop(_part(trainer, trainer.global_rank), "their prompts are not asked any more")
        self._close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            whole = folder / f"{NAME}.partial"
            with whole.open("w", encoding="utf-8") as stream:
                for rank in range(trainer.world_size):
                    for batch in _whole_lines(_part(trainer, rank))[1:]:
                        stream.writelines(_line(row) for row in batch["rows"])
            self.written = whole.replace(folder / NAME)
            # Of more processes than these, too: an earlier call's.
            for part in folder.glob(PART.format("*")):
                part.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

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

    def _drop(self, path: Path, why: str) -> None:
        """Forget what is there and was not asked for again."""
        if self._there:
            log.warning("%s: %d batches are dropped: %s", path.name, len(self._there), why)
        self._there = []
        self._begin(path)

    def _begin(self, path: Path) -> None:
        """The file with what is kept and there, and nothing else, to be gone on with; whole at any time."""
        self._close()
        new = path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as stream:
            stream.writelines(map(_line, [*self._kept, *self._there]))
            stream.flush()
            os.fsync(stream.fileno())
        self._stream = new.replace(path).open("a", encoding="utf-8")

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _line(value: Any) -> str:
    # ASCII: a reply may hold half a surrogate pair, which no UTF-8 file can.
    return json.dumps(value) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file that a killed process may have left: all before a line that is cut off, or of another kind of
    file."""
    found: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines(keepends=True):
        try:
            value = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            value = None
        if not isinstance(value, dict) or value.keys() != ({"asked", "rows"} if found else {"by"}):
            break
        found.append(value)
    return found


def _part(trainer: Trainer, rank: int) -> Path:
    return Path(trainer.default_root_dir) / PART.format(rank)
