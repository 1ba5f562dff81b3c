"""A metric that a callback is told to watch and that nobody ever logs is an error, not silence."""

from __future__ import annotations

import logging
from difflib import get_close_matches

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.run_folder.folder import RunError

log = logging.getLogger(__name__)


class ChecksMonitors(Callback):
    """Lightning's ModelCheckpoint saves nothing and says nothing where its metric does not exist; this warns
    at the end of the first epoch and is an error at the end of the run. The CLI adds it to every run."""

    def __init__(self) -> None:
        self._warned = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = None if self._warned else self._missing(trainer)
        self._warned = True
        if found is not None:
            log.warning("%s so far", found)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises: RunError naming the metric and those that there are."""
        found = self._missing(trainer)
        if found is not None:
            raise RunError(f"{found}: it saved no checkpoint")

    def _missing(self, trainer: Trainer) -> str | None:
        known = sorted(trainer.callback_metrics)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            wanted = callback.monitor if isinstance(callback, ModelCheckpoint) else None
            if wanted is None or wanted in known:
                continue
            near = get_close_matches(wanted, known, 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            return (
                f"ModelCheckpoint.monitor: nothing has logged {wanted!r}{hint} (there are {', '.join(known)})"
            )
        return None
