"""When a run writes checkpoints, and the one function that finds the checkpoint a command starts from.

The one before the newest is removed only afterwards; what decided a checkpoint's weights is compared with the
configuration at hand, so that another run is not continued with them.
"""

from __future__ import annotations

import itertools
import logging
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from callbacks.run_folder.checkpoint_files import (
    CONFIGURATION,
    DamagedCheckpoint,
    RunCheckpointIO,
    load_file,
    read_record,
    remove,
)
from callbacks.run_folder.decisive import LOADING, STEPS, Flat, begun_with, decisive, differences
from callbacks.run_folder.folder import RunError, RunFolder
from datamodules.contents import CONTENT
from datamodules.fields import Count, Positive, checked

log = logging.getLogger(__name__)
SHOWN = 4
"""Differing fields that a message names."""


@checked
class RunCheckpoints(Checkpoint):
    """The run's own checkpoints, `checkpoints/step_000010.ckpt` in the run folder.

    A kill costs what was done since the last one: at most `every_n_steps` steps or `every_minutes` minutes
    and a step.

    Args:
        every_n_steps: after every so many optimiser steps; null for never.
        every_minutes: at the first step after so many minutes; null for never. For large models, whose
            checkpoints take seconds to write.
        keep: how many of the newest stay; with 2, a file that is damaged later still has one before it.
    """

    def __init__(
        self, every_n_steps: Count | None = 1, every_minutes: Positive | None = None, keep: Count = 2
    ) -> None:
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self._saved_step = self._seen_step = 0
        self._saved_at = time.monotonic()

    def kept(self, last: int) -> tuple[int, ...] | None:
        """The steps whose checkpoints a training of `last` steps leaves, None where time decides."""
        if self.every_minutes is not None:
            return None
        every = self.every_n_steps or last
        return tuple([*range(every, last, every), last][-self.keep :])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write safely also where no command line has seen to it."""
        if not isinstance(trainer.strategy.checkpoint_io, RunCheckpointIO):
            trainer.strategy.checkpoint_io = RunCheckpointIO()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises: RunError where a new training would write among another one's checkpoints."""
        folder = RunFolder.of(trainer.default_root_dir)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            if trainer.ckpt_path is None and any(folder.checkpoints.glob("*.ckpt")):
                folder.refuse_used()
            for partial in folder.checkpoints.glob("*.partial"):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = self._seen_step = trainer.global_step
        self._saved_at = time.monotonic()
        if trainer.is_global_zero and not trainer.fast_dev_run:
            # Of a branch that is left, or damaged: `last` must never find them again.
            for path in _newest_first(RunFolder.of(trainer.default_root_dir).path):
                if _step(path) > trainer.global_step:
                    log.warning("%s is beyond the step that training goes on from: set aside", path)
                    path.rename(_free(path.with_suffix(".aside")))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # Between two steps of an accumulation there is nothing to resume from.
        stepped, self._seen_step = step != self._seen_step, step
        if not stepped:
            return
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        if by_steps or self._is_time(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def _is_time(self, trainer: Trainer) -> bool:
        if self.every_minutes is None:
            return False
        # All processes must save together, and their clocks differ.
        due = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return bool(trainer.strategy.broadcast(due))

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of this step, unless it stands already. All processes call it together, between
        two steps."""
        if trainer.fast_dev_run or trainer.global_step == self._saved_step:
            return
        folder = RunFolder.of(trainer.default_root_dir)
        # Said aloud, or Lightning says at every step that it was not.
        trainer.save_checkpoint(folder.checkpoint(trainer.global_step), weights_only=False)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            # By number: as texts, step 1,000,000 comes before 999,999.
            for old in sorted(folder.checkpoints.glob("step_*.ckpt"), key=_step)[: -self.keep]:
                remove(old)


def _free(path: Path) -> Path:
    """The path, or the first of PATH.1, PATH.2, ... that is free: what is set aside is never replaced."""
    places = itertools.chain([path], (path.with_name(f"{path.name}.{i}") for i in itertools.count(1)))
    return next(place for place in places if not place.exists())


def find_checkpoint(
    folder: str | Path, ckpt_path: str | None, command: str, config: Mapping[str, Any]
) -> Path | None:
    """The checkpoint that a command starts from, verified; the one meaning of `last`.

    `last` is the newest complete checkpoint of the run in this folder. Where there is none `fit` starts from
    the beginning, and says so; the other commands stop. Null evaluates the model before training, and says so
    where that is not all there is.

    Args:
        folder: the run folder.
        ckpt_path: a path, `last`, or null for none.
        command: fit, validate, test, predict or attack.
        config: the resolved configuration.

    Raises: RunError where there is no such file, it is damaged, or another configuration made it.
    """
    if ckpt_path is None:
        if command != "fit" and _newest_first(RunFolder.of(folder).path):
            log.warning(
                "no ckpt_path: this is the model before training; --ckpt_path last takes what %s holds",
                RunFolder.of(folder).checkpoints,
            )
        return None
    if ckpt_path == "best":
        raise RunError(
            "ckpt_path: 'best' is known only to the process that trained; give the file's path, or `last`"
        )
    found = (
        _newest(RunFolder.of(folder), command)
        if ckpt_path == "last"
        else (Path(ckpt_path), read_record(ckpt_path))
    )
    now = decisive(config)
    if found is None:
        if command != "fit":
            raise RunError(
                f"ckpt_path: no checkpoint in {RunFolder.of(folder).checkpoints}; train first (thundercat "
                "fit), give a checkpoint's path, or --ckpt_path none to evaluate the model before "
                "training"
            )
        _compare(begun_with(RunFolder.of(folder).config()), now, RunFolder.of(folder).config(), None)
        log.warning("no checkpoint in %s yet: training starts at step 0", RunFolder.of(folder).checkpoints)
        return None
    path, content = found
    then = content.get(CONFIGURATION)
    _compare(then, now, path, None if command == "fit" else LOADING)
    if then is not None and ckpt_path != "last":
        _refuse_another_run(RunFolder.of(folder), path, then)
    steps = differences(then, now, STEPS) if then and command == "fit" else []
    if steps:
        log.warning("%s: the learning rate goes on by the schedule over the new total", "; ".join(steps))
    return path


def _newest(folder: RunFolder, command: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint. Raises: DamagedCheckpoint where there are some and none is complete."""
    damaged = ""
    # Lightning's own callback, where a recipe has no other, writes beneath its logger's folder.
    for path in _newest_first(folder.path):
        try:
            content = read_record(path)
        except DamagedCheckpoint as error:
            log.warning("%s; the one before it is taken", error)
            damaged = str(error)
            continue
        if command == "fit" and "optimizer_states" not in content:
            log.warning("%s holds weights alone, no training goes on from it; an earlier one is taken", path)
            continue
        return path, content
    if damaged:
        raise DamagedCheckpoint(f"{damaged}; none before it is left: start again with --overwrite")
    return None


def _newest_first(folder: Path) -> list[Path]:
    """By step, as the files' names or else the files say, then by time."""
    own = [path for path in folder.rglob("*.ckpt") if not _in_another_run(path, folder)]
    return sorted(own, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def _in_another_run(path: Path, folder: Path) -> bool:
    """Whether a run of its own lies between them: a folder may hold a sweep's runs."""
    between = list(path.relative_to(folder).parents)[:-1]
    return any(RunFolder.of(folder / own).config().is_file() for own in between)


def _step(path: Path) -> int:
    named = re.fullmatch(r"step_(\d+)", path.stem)
    if named:
        return int(named.group(1))
    try:
        return int(load_file(path, mmap=True)["global_step"])
    except (DamagedCheckpoint, KeyError, TypeError):
        return -1


def _refuse_another_run(folder: RunFolder, path: Path, then: Flat) -> None:
    """Raises: RunError where the folder is of a run that this checkpoint is not of: its results would stand
    among that run's, as what its training came to."""
    begun = begun_with(folder.config())
    # What files held is of the time of training; they may have been changed since.
    found = differences(_without_contents(begun), _without_contents(then)) if begun is not None else []
    if found:
        raise RunError(
            f"ckpt_path: {path} is no checkpoint of the run in {folder.path} ({found[0]}); give its own "
            "run's folder, or a new one, with --trainer.default_root_dir=FOLDER"
        )


def _without_contents(fields: Flat) -> Flat:
    return {key: value for key, value in fields.items() if not key.endswith(f".{CONTENT}")}


def _compare(then: Flat | None, now: Flat, where: Path, only: tuple[str, ...] | None) -> None:
    if then is None:
        return
    found = differences(then, now, only)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        if all(own.split(":")[0].endswith(f".{CONTENT}") for own in found):
            raise RunError(
                f"ckpt_path: {where} was made when files held something else: {'; '.join(found[:SHOWN])}"
                f"{more} (digests); restore what they held, or use another folder"
            )
        raise RunError(
            f"ckpt_path: {where} was made by another configuration: {'; '.join(found[:SHOWN])}{more}; use "
            f"--config {where.parent.parent / 'config.yaml' if where.suffix == '.ckpt' else where}, or "
            "another folder"
        )
