"""The replies of `thundercat predict` as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning import Callback, LightningModule, Trainer

from callbacks.run_folder.folder import RunError

NAME = "predictions.jsonl"


class WritesPredictions(Callback):
    """Appends {key, prompt, reply, cut, checkpoint} rows to a file of each process as they come; at the end
    they are `predictions.jsonl` in the run folder, and only then is an earlier one replaced.

    Args:
        checkpoint: the checkpoint that replies, None for the model before training.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = None if checkpoint is None else checkpoint.name
        self.written: Path | None = None
        """The finished file; null where there was no prompt."""
        self._stream: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = _part(trainer, trainer.global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("w", encoding="utf-8")

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
        for row in outputs:
            # ASCII: a reply may hold half a surrogate pair, which no UTF-8 file can.
            self._stream.write(json.dumps({**row, "checkpoint": self.checkpoint}) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            parts = [_part(trainer, rank) for rank in range(trainer.world_size)]
            whole = Path(trainer.default_root_dir) / f"{NAME}.partial"
            whole.write_bytes(b"".join(part.read_bytes() for part in parts))
            self.written = whole.replace(Path(trainer.default_root_dir) / NAME)
            for part in parts:
                part.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _part(trainer: Trainer, rank: int) -> Path:
    return Path(trainer.default_root_dir) / f"predictions_rank{rank}.jsonl.partial"
