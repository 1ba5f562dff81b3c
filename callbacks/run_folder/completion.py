"""What Lightning leaves out where a run was stopped at the end of an epoch, or of its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar


class CompletesRun(Callback):
    """Has the callbacks do what a resumed run would miss; the CLI adds it to every run.

    Lightning leaves its loop at once when a checkpoint already stands at the last step, and calls neither
    `on_train_start` nor `on_train_end`: a run that was killed, or found the disk full, after its last
    checkpoint would never export its model nor write its cost, and exit as if it had. And after a checkpoint
    of an epoch's last step it goes on with the next epoch: what EarlyStopping says of the one that ended
    would be lost, and the resumed run would train on where the other stopped.
    """

    def __init__(self) -> None:
        self._trained = False
        self._in_epoch = False
        self._end_missed = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_epoch = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Called before those of EarlyStopping and ModelCheckpoint: what they save has seen the end.
        self._in_epoch = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["epoch_end_missed"] = self._in_epoch and trainer.is_last_batch

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._end_missed = checkpoint.get("epoch_end_missed", False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True
        # A resumed epoch begins in the middle, without its start.
        self._in_epoch = True
        if self._end_missed:
            for callback in _callbacks(trainer):
                if isinstance(callback, EarlyStopping):
                    callback.on_train_epoch_end(trainer, pl_module)
            self._end_missed = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trained or trainer.ckpt_path is None or not trainer.global_step:
            return
        others = [own for own in _callbacks(trainer) if own is not self and not isinstance(own, ProgressBar)]
        for callback in others:
            callback.on_train_start(trainer, pl_module)
        for callback in others:
            callback.on_train_end(trainer, pl_module)
        for logger in trainer.loggers:
            logger.save()


def _callbacks(trainer: Trainer) -> Sequence[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]
