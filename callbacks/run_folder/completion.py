"""A run that was stopped between its last step and its end still gets its end."""

from __future__ import annotations

from collections.abc import Sequence

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar


class CompletesRun(Callback):
    """Has the callbacks do what belongs to the end of training where no step is left to train; the CLI adds
    it to every run.

    Lightning leaves its loop at once when a checkpoint already stands at the last step, and calls neither
    `on_train_start` nor `on_train_end`: a run that was killed, or found the disk full, after its last
    checkpoint would never export its model nor write its cost, and exit as if it had.
    """

    def __init__(self) -> None:
        self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trained or trainer.ckpt_path is None or not trainer.global_step:
            return
        callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [own for own in callbacks if own is not self and not isinstance(own, ProgressBar)]
        for callback in others:
            callback.on_train_start(trainer, pl_module)
        for callback in others:
            callback.on_train_end(trainer, pl_module)
        for logger in trainer.loggers:
            logger.save()
