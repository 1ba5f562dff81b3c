"""Checkpoints that are whole or not there, know the run that made them, and are found by one function.

A checkpoint is written beside its target, flushed and renamed: whatever ends the process, the file under the
final name is complete, and the one before it is removed only afterwards. It holds a digest of its content,
so that a damaged file is noticed, and the configuration that decided its weights, so that another run is not
continued with them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from callbacks.run_folder.decisive import LOADING, STEPS, Flat, begun_with, decisive, differences
from callbacks.run_folder.folder import RunError, RunFolder
from datamodules.fields import Count, Positive, checked

log = logging.getLogger(__name__)
DIGEST, CONFIGURATION = "content_digest", "decisive_configuration"
SHOWN = 4
"""Differing fields that a message names."""


class DamagedCheckpoint(RunError):
    """A file that is no complete checkpoint."""


class RunCheckpointIO(CheckpointIO):
    """How every checkpoint of a run is written and read, those of Lightning's own ModelCheckpoint too.

    Args:
        configuration: the fields that decide the weights (`decisive`); null where none are known.
    """

    def __init__(self, configuration: Flat | None = None) -> None:
        self.configuration = configuration

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write, flush, rename. Raises: RunError where the disk is full or the folder cannot be written."""
        content = {**checkpoint, CONFIGURATION: self.configuration}
        content[DIGEST] = digest(content)
        target = Path(path)
        partial = target.with_name(f"{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                torch.save(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)
            flush_folder(target.parent)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write as a RuntimeError of its own.
            partial.unlink(missing_ok=True)
            raise RunError(
                f"{target}: cannot write the checkpoint ({_cause(error)}); earlier ones are kept: make room, "
                "then resume with --ckpt_path last"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Raises: DamagedCheckpoint."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


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
        self._saved_step = 0
        self._saved_at = time.monotonic()

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
                partial.unlink()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero and not trainer.fast_dev_run:
            # Of a branch that is left, or damaged: `last` must never find them again.
            for path in RunFolder.of(trainer.default_root_dir).checkpoints.glob("step_*.ckpt"):
                if _step(path) > trainer.global_step:
                    log.warning("%s is beyond the step that training goes on from: set aside", path)
                    path.rename(path.with_suffix(".aside"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # Between two steps of an accumulation there is nothing to resume from.
        if step == self._saved_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        if by_steps or self._is_time(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def _is_time(self, trainer: Trainer) -> bool:
        if self.every_minutes is None:
            return False
        # All processes must save together, and their clocks differ.
        due = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return bool(trainer.strategy.broadcast(due))

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        folder = RunFolder.of(trainer.default_root_dir).checkpoints
        # Said aloud, or Lightning says at every step that it was not.
        trainer.save_checkpoint(folder / f"step_{trainer.global_step:06d}.ckpt", weights_only=False)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            for old in sorted(folder.glob("step_*.ckpt"))[: -self.keep]:
                old.unlink()


def find_checkpoint(
    folder: str | Path, ckpt_path: str | None, command: str, config: Mapping[str, Any]
) -> Path | None:
    """The checkpoint that a command starts from, verified; the one meaning of `last`.

    `last` is the newest complete checkpoint of the run in this folder. Where there is none `fit` starts from
    the beginning, and says so; the other commands stop.

    Args:
        folder: the run folder.
        ckpt_path: a path, `last`, or null for none.
        command: fit, validate, test, predict or attack.
        config: the resolved configuration.

    Raises: RunError where there is no such file, it is damaged, or another configuration made it.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "best":
        raise RunError(
            "ckpt_path: 'best' is known only to the process that trained; give the file's path, or `last`"
        )
    found = (
        _newest(RunFolder.of(folder))
        if ckpt_path == "last"
        else (Path(ckpt_path), read_checkpoint(ckpt_path))
    )
    now = decisive(config)
    if found is None:
        if command != "fit":
            raise RunError(
                f"ckpt_path: no checkpoint in {RunFolder.of(folder).checkpoints}; train first (thundercat "
                "fit), give a checkpoint's path, or leave ckpt_path out to evaluate the model before "
                "training"
            )
        _compare(begun_with(RunFolder.of(folder).config()), now, RunFolder.of(folder).config(), None)
        log.warning("no checkpoint in %s yet: training starts at step 0", RunFolder.of(folder).checkpoints)
        return None
    path, content = found
    then = content.get(CONFIGURATION)
    _compare(then, now, path, None if command == "fit" else LOADING)
    if then is not None and ckpt_path != "last" and command in ("validate", "test"):
        _refuse_another_run(RunFolder.of(folder), path, then)
    steps = differences(then, now, STEPS) if then and command == "fit" else []
    if steps:
        log.warning("%s: the learning rate goes on by the schedule over the new total", "; ".join(steps))
    return path


def _newest(folder: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """The newest complete checkpoint. Raises: DamagedCheckpoint where there are some and none is complete."""
    damaged = ""
    for path in _newest_first(folder.checkpoints):
        try:
            content = read_checkpoint(path)
        except DamagedCheckpoint as error:
            log.warning("%s; the one before it is taken", error)
            damaged = str(error)
            continue
        return path, content
    if damaged:
        raise DamagedCheckpoint(f"{damaged}; none before it is left: start again with --overwrite")
    return None


def _newest_first(folder: Path) -> list[Path]:
    """By step, as the files' names or else the files say, then by time."""
    return sorted(
        folder.rglob("*.ckpt"), key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True
    )


def _step(path: Path) -> int:
    name = path.stem.rpartition("step_")[2]
    if name.isdigit():
        return int(name)
    try:
        return int(_load(path, mmap=True)["global_step"])
    except (DamagedCheckpoint, KeyError, TypeError):
        return -1


def _refuse_another_run(folder: RunFolder, path: Path, then: Flat) -> None:
    """Raises: RunError where the folder is of a run that this checkpoint is not of: its results would stand
    among that run's, as what its training came to."""
    begun = begun_with(folder.config())
    found = differences(begun, then) if begun is not None else []
    if found:
        raise RunError(
            f"ckpt_path: {path} is no checkpoint of the run in {folder.path} ({found[0]}); give its own "
            "run's folder, or a new one, with --trainer.default_root_dir=FOLDER"
        )


def _compare(then: Flat | None, now: Flat, where: Path, only: tuple[str, ...] | None) -> None:
    if then is None:
        return
    found = differences(then, now, only)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise RunError(
            f"ckpt_path: {where} was made by another configuration: {'; '.join(found[:SHOWN])}{more}; use "
            f"--config {where.parent.parent / 'config.yaml' if where.suffix == '.ckpt' else where}, or "
            "another folder"
        )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, verified; nothing in it is executed.

    Raises: RunError where there is no file, DamagedCheckpoint where it is not what was written.
    """
    content = _load(Path(path))
    stored = content.pop(DIGEST, None)
    if stored is None:
        raise DamagedCheckpoint(f"{path}: no checkpoint of a run (it has no digest)")
    if stored != digest(content):
        raise DamagedCheckpoint(f"{path}: damaged (its content is not what was written)")
    return content


def _load(path: Path, mmap: bool = False) -> dict[str, Any]:
    if not path.is_file():
        raise RunError(f"ckpt_path: no file {str(path)!r}; give a checkpoint of this run, or `last`")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file can end in any of the unpickler's errors
        raise DamagedCheckpoint(f"{path}: damaged, or no checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{path}: no checkpoint (it holds a {type(content).__name__})")
    return content


def load_weights(module: LightningModule, path: str | Path) -> int:
    """Load a checkpoint's weights into a configured module and return its step; all that learn must be there.

    Raises: RunError for a missing or damaged file, ValueError where the weights do not fit the module.
    """
    content = read_checkpoint(path)
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"], strict=module.strict_loading)
    return int(content["global_step"])


def digest(content: Any) -> str:
    """Of the values and their order, whatever file they lie in."""
    found = hashlib.blake2b(digest_size=16)
    for part in _parts(content):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, torch.Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)};".encode()
        for key, item in value.items():
            yield from _parts(key)
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} {len(value)};".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield f"{type(value).__name__} {value!r};".encode()


def flush_folder(folder: Path) -> None:
    """A rename is on disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """The operating system's word where it has one: torch hides `No space left on device` under its own."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if error.__cause__ is None and error.__context__ is None:
            break
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error).splitlines()[0][:120]
