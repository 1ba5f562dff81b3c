"""Loggers: a CSV log that outlives a kill, a W&B logger that never stops a run, and sample tables for the
loggers that can show them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger

log = logging.getLogger(__name__)


class RunCSVLogger(CSVLogger):
    """The run folder's own log: every row is on disk at once, and a resumed run or a later `test` never
    deletes earlier rows.

    Writes `csv/metrics.csv`, or `csv_2/`, `csv_3/`, ... where that exists.

    Args:
        save_dir: the run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", flush_logs_every_n_steps=1)
        self._chosen: str | None = None

    @property
    def log_dir(self) -> str:
        if self._chosen is None:
            taken = len(csv_logs(self.save_dir))
            self._chosen = str(Path(self.save_dir) / ("csv" if not taken else f"csv_{taken + 1}"))
        return self._chosen


def csv_logs(folder: str | Path) -> list[Path]:
    """The CSV logs of a run folder, oldest first."""
    paths = Path(folder).glob("csv*/metrics.csv")
    return sorted(paths, key=lambda path: int(path.parent.name.partition("_")[2] or 1))


class LastLogRow(Callback):
    """The log's row of the step that a checkpoint ends, in the checkpoint; the CLI adds it to every run.

    Lightning writes the row after the checkpoint: a kill between the two would leave a hole in the log of the
    resumed run.
    """

    def __init__(self) -> None:
        self._row: dict[str, float] = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint["log_row"] = metrics | {"epoch": trainer.current_epoch}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._row = checkpoint.get("log_row", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if self._row and isinstance(logger, RunCSVLogger):
                logger.log_metrics(self._row, trainer.global_step - 1)
                logger.save()


class ResilientWandbLogger(WandbLogger):
    """Weights & Biases: online where a key is found, offline otherwise; a failing service costs a warning,
    not the run.

    Args:
        project: W&B project.
        name: run name; null lets W&B choose.
        save_dir: where W&B keeps its files.
    """

    def __init__(self, project: str = "thundercat", name: str | None = None, save_dir: str = "runs") -> None:
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        self._broken = False
        super().__init__(project=project, name=name, save_dir=save_dir, offline=not has_wandb_key())

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._attempt(lambda: super(ResilientWandbLogger, self).log_metrics(metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        self._attempt(lambda: super(ResilientWandbLogger, self).log_hyperparams(params))

    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        self._attempt(
            lambda: super(ResilientWandbLogger, self).log_table(key, columns, data, dataframe, step)
        )

    def finalize(self, status: str) -> None:
        self._attempt(lambda: super(ResilientWandbLogger, self).finalize(status))

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            action()
        except Exception as error:  # whatever the service or the network raises, training goes on
            self._broken = True
            log.warning("W&B logging stopped (%s: %s); the CSV log goes on", type(error).__name__, error)


def has_wandb_key() -> bool:
    """Whether W&B could log in: an environment variable or a netrc entry."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, NetrcParseError):
        return False


def log_table(trainer: Trainer, key: str, rows: list[dict[str, Any]], limit: int = 200) -> None:
    """Show sample rows in every W&B logger (the run folder's `samples/` holds all of them in any case)."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            columns = list(rows[0])
            logger.log_table(
                key,
                columns=columns,
                data=[[str(row[c]) for c in columns] for row in rows[:limit]],
                step=trainer.global_step,
            )
