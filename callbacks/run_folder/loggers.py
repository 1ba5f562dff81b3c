"""Loggers: a CSV log that outlives a kill, a W&B logger that never stops a run, hyperparameters for every
logger, and sample tables for those that can show them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import wandb
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from datamodules.fields import Positive, checked

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
            # Also a folder without rows: `predict` logs its configuration alone.
            taken = [_number(path / "x") for path in Path(self.save_dir).glob("csv*") if any(path.iterdir())]
            self._chosen = str(Path(self.save_dir) / (f"csv_{max(taken) + 1}" if taken else "csv"))
        return self._chosen


def csv_logs(folder: str | Path) -> list[Path]:
    """The CSV logs of a run folder, oldest first."""
    paths = Path(folder).glob("csv*/metrics.csv")
    return sorted(paths, key=_number)


def _number(path: Path) -> int:
    return int(path.parent.name.partition("_")[2] or 1)


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
        # What an evaluation found stands in the log at the evaluation's own step already.
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {name: value for name, value in logged.items() if not name.startswith("eval/")}
        checkpoint["log_row"] = row | {"epoch": trainer.current_epoch}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._row = checkpoint.get("log_row", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._row.items()})
        for logger in trainer.loggers:
            if self._row and isinstance(logger, RunCSVLogger):
                # Lightning counts the log's rows from 0.
                logger.log_metrics(self._row, trainer.global_step - 1)
                logger.save()


class LogConfiguration(Callback):
    """Sends the resolved configuration to every logger as hyperparameters; the CLI adds it to every run.

    Args:
        config: the resolved configuration of the run.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(flat(self.config))


def flat(config: Any, path: str = "") -> dict[str, Any]:
    """A configuration as one level of readable keys: `model.attack.epsilon`, `model.attack.class`.

    `init_args` is left out of the names; a list of plain values stays one value.
    """
    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        config = dict(enumerate(config))
    if not isinstance(config, dict):
        return {path: config}
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key == "class_path":
            values[f"{path}.class"] = str(value).rpartition(".")[2]
        else:
            values |= flat(value, path if key == "init_args" else f"{path}.{key}".lstrip("."))
    return values


@checked
class ResilientWandbLogger(WandbLogger):
    """Weights & Biases that never stops a run: online where a key is found, offline otherwise.

    A service that cannot be reached in `start_timeout` seconds is given up, and the record is kept on disk
    for `wandb sync`; whatever fails later costs a warning.

    Args:
        project: W&B project.
        name: run name; null lets W&B choose.
        save_dir: where W&B keeps its files.
        start_timeout: seconds to wait for the service at the start, and at the end for what is not sent.
    """

    def __init__(
        self,
        project: str = "thundercat",
        name: str | None = None,
        save_dir: str = "runs",
        start_timeout: Positive = 20.0,
    ) -> None:
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        self._broken = False
        limits = wandb.Settings(
            init_timeout=start_timeout, login_timeout=start_timeout, finish_timeout=start_timeout
        )
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        super().__init__(project=project, name=name, save_dir=save_dir, settings=limits, mode=mode)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun at the first call: Lightning asks for it before training, outside any guard."""
        if self._experiment is None and not self._broken:
            self._start()
        return self._experiment or _DummyExperiment()

    def _start(self) -> None:
        # Lightning's own start, which this class's property of the same name hides.
        begin = WandbLogger.experiment.fget
        assert begin is not None
        try:
            begin(self)
        except Exception as error:  # no network, a refused key, a server that answers nonsense
            log.warning("W&B cannot be used (%s); its record stays on disk", _one_line(error))
            self._wandb_init["mode"] = "offline"
            self._attempt(lambda: begin(self))
        if self._wandb_init["mode"] == "offline" and self._experiment is not None:
            log.info("send the W&B record later: wandb sync %s", Path(self._experiment.dir).parent)

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
            log.warning("W&B logging stopped (%s); the CSV log goes on", _one_line(error))


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def has_wandb_key() -> bool:
    """Whether W&B could log in: an environment variable or a netrc entry of its server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc().authenticators(host or "") is not None
    except (FileNotFoundError, NetrcParseError):
        return False


def log_table(trainer: Trainer, key: str, rows: list[dict[str, Any]], limit: int = 200) -> None:
    """Show sample rows in every W&B logger (the run folder's `rows/` holds all of them in any case)."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            columns = list(rows[0])
            logger.log_table(
                key,
                columns=columns,
                data=[[str(row[c]) for c in columns] for row in rows[:limit]],
                step=trainer.global_step,
            )
