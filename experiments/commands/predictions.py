"""The replies of `thundercat predict` as a file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning import Callback, LightningModule, Trainer

from callbacks.run_folder.folder import RunError
from datamodules.batch import EvaluationBatch
from datamodules.settings import contents, settings_digest
from lightning_modules.models.fingerprint import fingerprint
from lightning_modules.pretrained import PretrainedModel

NAME = "predictions.jsonl"
log = logging.getLogger(__name__)


class WritesPredictions(Callback):
    """Appends {key, prompt, reply, cut, checkpoint} rows, a batch a line, to a file of each process as they
    come; at the end they are `predictions.jsonl` in the run folder, a row a line, and only then is an earlier
    one replaced.

    After a kill the same command goes on behind the last whole batch: where the same weights were asked the
    same in the same way, which the file's first line and each of its batches say by a digest.

    Args:
        checkpoint: the checkpoint that replies, None for the model before training.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = None if checkpoint is None else checkpoint.name
        self.written: Path | None = None
        """The finished file; null where there was no prompt."""
        self._stream: TextIO | None = None
        self._there: list[dict[str, Any]] = []
        """Batches of an earlier call that were not yet asked for."""
        self._asked = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = _part(trainer, trainer.global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        replies_by = self._replies_by(trainer, pl_module)
        found = _whole_lines(path)
        if found and replies_by and found[0] == {"by": replies_by}:
            self._there = found[1:]
            log.info("%d batches are there already: going on behind them", len(self._there))
        self._begin(path, [{"by": replies_by}, *self._there])

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
            # Other prompts from here on: what was replied to the former ones is no part of the file.
            path = _part(trainer, trainer.global_rank)
            self._begin(path, _whole_lines(path)[: -len(self._there)])
            self._there = []
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
        if self._there:
            self._there.pop(0)
            return
        rows = [{**row, "checkpoint": self.checkpoint} for row in outputs]
        self._stream.write(_line({"asked": self._asked, "rows": rows}))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            parts = [_part(trainer, rank) for rank in range(trainer.world_size)]
            whole = Path(trainer.default_root_dir) / f"{NAME}.partial"
            with whole.open("w", encoding="utf-8") as stream:
                for part in parts:
                    for batch in _whole_lines(part)[1:]:
                        stream.writelines(_line(row) for row in batch["rows"])
            self.written = whole.replace(Path(trainer.default_root_dir) / NAME)
            for part in parts:
                part.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _replies_by(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """What decides a reply besides the prompt, and which prompts are this process's; None of a module
        that replies in a way of its own."""
        if not isinstance(pl_module, PretrainedModel):
            return None
        return settings_digest(
            fingerprint(pl_module.model),
            self.checkpoint,
            pl_module.predicted_tokens,
            pl_module.defence,
            str(trainer.precision),
            trainer.world_size,
        )

    def _begin(self, path: Path, lines: list[dict[str, Any]]) -> None:
        """The file with these lines and no others, to be gone on with; whole at any time."""
        self._close()
        new = path.with_suffix(".new")
        new.write_text("".join(map(_line, lines)), encoding="utf-8")
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
        if not isinstance(value, dict) or value.keys() not in ({"by"}, {"asked", "rows"}):
            break
        found.append(value)
    return found


def _part(trainer: Trainer, rank: int) -> Path:
    return Path(trainer.default_root_dir) / f"predictions_rank{rank}.jsonl.partial"
