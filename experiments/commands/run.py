"""fit, validate, test, predict: compose, check, seeds, build, lock, execute."""

from __future__ import annotations

import copy
import errno
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.evaluations.base import Evaluation, introduce
from callbacks.evaluations.measuring import Measuring
from callbacks.progress import install_progress
from callbacks.report.escape import printable
from callbacks.report.report import RunReport
from callbacks.run_folder.checkpoint_files import RunCheckpointIO, load_weights
from callbacks.run_folder.checkpoints import find_checkpoint
from callbacks.run_folder.completion import CompletesRun
from callbacks.run_folder.decisive import decisive
from callbacks.run_folder.folder import RunFolder
from callbacks.run_folder.lock import RunLock
from callbacks.run_folder.loggers import LastLogRow, LogConfiguration
from callbacks.run_folder.monitors import ChecksMonitors
from callbacks.run_folder.provenance import Provenance
from callbacks.run_folder.requeue import Preempted
from callbacks.run_folder.stopping import Stopped, StopsAtOnce, end_with_parent, stoppable
from datamodules.evaluation import EvaluationData
from experiments.commands.predictions import WritesPredictions
from experiments.config.check import check
from experiments.config.compose import ConfigError, compose
from experiments.config.defaults import with_defaults, with_plain_defaults
from experiments.config.job import check_started, check_tasks
from experiments.config.seeds import seeds_of, with_seeds
from experiments.process import ENDS_WITH, STARTED_BY, end_if_asked
from experiments.studies.processes import NO_SPACE
from lightning_modules.pretrained import PretrainedModel

EXPECTED = (ValueError, OSError, FloatingPointError)
"""Errors whose message is for the user; any other kind is named, with the way to see where it came from."""
TRACEBACK = "traceback.txt"
"""In a run's folder: of the last error that nobody foresaw."""


class ThundercatCLI(LightningCLI):
    """LightningCLI over one resolved configuration."""

    def __init__(self, args: ArgsType, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=args,
            run=run,
            parser_kwargs={"exit_on_error": False},
        )


def run(
    command: str, files: Sequence[str], overrides: Sequence[tuple[str, str]], flags: Sequence[str]
) -> int:
    """Compose, check and run. Returns the exit status. Raises: ConfigError for a wrong configuration."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if os.environ.get("LOCAL_RANK", "0") != "0":
        end_with_parent(STARTED_BY)
    elif ENDS_WITH in os.environ:
        # Not for the processes that this one starts.
        end_with_parent(int(os.environ.pop(ENDS_WITH)))
    config = resolved(command, files, overrides)
    if "--print_config" in flags:
        print(yaml.safe_dump(config, sort_keys=False), end="")
        return 0
    folder = RunFolder.of(config["trainer"]["default_root_dir"])
    show_traceback = "--traceback" in flags
    return guarded(lambda: _begin(command, config, folder, "--overwrite" in flags), folder, show_traceback)


def resolved(command: str, files: Sequence[str], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The checked configuration with defaults and seeds. Raises: ConfigError."""
    if not files:
        raise ConfigError("expected at least one --config FILE; start with --config configs/quickstart.yaml")
    config = compose(files, overrides)
    check(config, command)
    return with_seeds(with_defaults(config))


def _begin(command: str, config: dict[str, Any], folder: RunFolder, overwrite: bool) -> int:
    if overwrite and config.get("ckpt_path") is not None:
        raise ConfigError(
            "--overwrite: begins a new run, and --ckpt_path goes on with one; leave one of them out"
        )
    begins = command == "fit" and config.get("ckpt_path") is None and not rank_zero_only.rank
    if begins and not overwrite:
        folder.refuse_used()
    check_started()
    cli = instantiate(config)
    check_tasks(cli.trainer.num_devices, cli.trainer.num_nodes)
    if begins and overwrite:
        # Only now: a configuration that a constructor refuses must leave the old run where it is.
        make_room(folder)
    with RunLock(folder.path):
        if begins:
            folder.refuse_used()
        checkpoint = find_checkpoint(folder.path, config.get("ckpt_path"), command, config)
        prepare(cli.trainer, command, config)
        return execute(cli, command, checkpoint)


def make_room(folder: RunFolder) -> None:
    """Move a used folder aside, unless another process writes in it. Raises: RunError."""
    with RunLock(folder.path):
        aside = folder.move_aside()
        if aside is not None:
            RunFolder(aside).lock.unlink(missing_ok=True)
            logging.getLogger(__name__).info("the run in %s is now in %s", folder.path, aside)


def instantiate(config: dict[str, Any]) -> ThundercatCLI:
    """Parse types and build trainer, module and datamodule; no model is loaded yet."""
    # The parser turns the lists of what it is given into its own kind of mapping, in place.
    own = {key: value for key, value in config.items() if key != "ckpt_path"}
    settings = with_plain_defaults(copy.deepcopy(own))
    try:
        with warnings.catch_warnings():
            # Lightning's own use of an older jsonargparse interface.
            os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
            # The arguments are this configuration, not sys.argv, and that is meant.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            return ThundercatCLI(settings, run=False)
    except SystemExit as error:
        raise ConfigError(f"the configuration was refused (exit status {error.code})") from error
    except MisconfigurationException as error:
        # Lightning's words speak of its constructor's arguments, which are these fields.
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    except Exception as error:  # jsonargparse wraps every constructor's error in its own
        raise ConfigError(innermost(error)) from error


def prepare(trainer: Trainer, command: str, config: dict[str, Any]) -> None:
    """What every run has: its record, its signals, and checkpoints that are whole."""
    trainer.strategy.checkpoint_io = RunCheckpointIO(decisive(config))
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False  # `RequeuesJob` says why
    if command == "fit":
        # The evaluation callbacks keep their own clock inside `fit`; Lightning's validation loop is for
        # `validate`.
        trainer.limit_val_batches = 0
    install_progress(trainer)
    own: list[Callback] = [Provenance(config, seeds_of(config)), StopsAtOnce(), LastLogRow()]
    own += [LogConfiguration(config), CompletesRun(), ChecksMonitors()]
    callbacks_of(trainer)[:0] = own


def execute(cli: ThundercatCLI, command: str, checkpoint: Path | None) -> int:
    """Run the command. Returns the exit status."""
    if command in ("validate", "test"):
        # Where a report prints its table, Lightning's own of every logged number would bury it.
        reported = any(isinstance(callback, RunReport) for callback in callbacks_of(cli.trainer))
        getattr(cli.trainer, command)(measuring(cli, checkpoint), verbose=not reported)
        return 0
    introduce(cli.model, cli.datamodule, callbacks_of(cli.trainer))
    path = None if checkpoint is None else str(checkpoint)
    if command == "predict":
        writes = WritesPredictions(checkpoint)
        callbacks_of(cli.trainer).append(writes)
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, ckpt_path=path, return_predictions=False)
        if not cli.trainer.is_global_zero:
            return 0
        if writes.written is None:
            raise ConfigError(
                "data.evaluation: found no prompt to predict for; set its sources, and "
                "trainer.limit_predict_batches above 0"
            )
        print(printable(str(writes.written), one_line=True))
        return 0
    # Said before: a strategy that shards the model reads it only after callbacks have asked for it.
    cli.trainer.ckpt_path = path
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return 0


def measuring(cli: ThundercatCLI, checkpoint: Path | None) -> Measuring:
    """The run's evaluations as the steps of Lightning's loop, on a checkpoint's weights."""
    module, data = cli.model, cli.datamodule
    if not isinstance(module, PretrainedModel) or not isinstance(data, EvaluationData):
        raise ConfigError(
            "model and data: expected a PretrainedModel or one that trains it, and EvaluationData"
        )
    module.attach(data.chat)
    module.configure_model()
    step = 0 if checkpoint is None else load_weights(module, checkpoint)
    evaluations = [own for own in callbacks_of(cli.trainer) if isinstance(own, Evaluation)]
    return Measuring(module, data, evaluations, step)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def guarded(action: Callable[[], int], folder: RunFolder, show_traceback: bool) -> int:
    """Do it; whatever ends it is one line on the terminal. Returns the exit status. Raises: ConfigError."""
    try:
        with stoppable():
            end_if_asked()
            return action()
    except Preempted as stop:
        _say(f"{stop}; {folder.path} is whole: {stop.put_back()}")
        return stop.exit_status
    except Stopped as stop:
        _say(
            f"{stop}; {folder.path} is whole: go on with --ckpt_path last (fit) or the same command (others)"
        )
        return stop.exit_status
    except ConfigError:
        if show_traceback:
            traceback.print_exc()
        raise
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            remedy = "make room, then go on with --ckpt_path last (fit) or the same command (others)"
            _say(f"{error.filename or folder.path}: {NO_SPACE}; {remedy}")
            return 1
        _say(one_line(error) + ("" if show_traceback or isinstance(error, EXPECTED) else _kept(folder)))
        return 1


def _kept(folder: RunFolder) -> str:
    """Where the traceback of an error that nobody foresaw is kept: it may have come after hours. In a run's
    folder alone, which a command that has not begun has not made."""
    place = folder.path / TRACEBACK
    try:
        place.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        return ""
    return f", or read {place}"


def one_line(error: Exception) -> str:
    """What happened, in one line: the error's own words where they are for the user."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    words = " ".join(str(error).split())
    if isinstance(error, EXPECTED):
        return words
    return f"unexpected {type(error).__name__}: {words[:300]}; run again with --traceback to see where"


class _Printable(logging.Formatter):
    """A record may hold the name of a file that somebody else wrote."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _say(text: str) -> None:
    print(f"thundercat: {printable(text, one_line=True)}", file=sys.stderr)


def _said_of_class(text: str) -> str | None:
    """What a constructor said whose class may stand alone or in a list: the parser tries all kinds, and the
    reason stands in the middle of what it says of each."""
    kinds = re.search(r"Subtypes: \[<class '(?:\w+\.)*(\w+)'>", text)
    tried = re.findall(r"^  - (.+)$", text, re.MULTILINE)
    said = [reason for reason in tried if not reason.startswith(("Not a valid subclass", "Expected a"))]
    return f"{kinds[1]}: {said[0]}" if kinds and said else None


def innermost(error: BaseException) -> str:
    """The cause at the bottom of a chain of parser errors, on one line, with the field's name in front."""
    keys: list[str] = []
    cause: BaseException = error
    while True:
        word = "Parser key|Validation failed: Key" + ("" if keys else "|key")
        key = re.search(rf'(?:{word}) "([^"]+)"', str(cause))
        if key and key[1] not in keys:
            # The parser names a field by itself, or by its whole path.
            keys = [key[1]] if keys and key[1].startswith(f"{'.'.join(keys)}.") else [*keys, key[1]]
        if cause.__cause__ is None and cause.__context__ is None:
            break
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    inner = [line.strip(" -") for line in str(cause).splitlines() if line.strip()]
    message = inner[-1] if inner else type(cause).__name__
    if message.startswith("a dict with"):  # the end of what it says of a list
        message = _said_of_class(str(error)) or message
    field = ".".join(keys)
    named = not field or re.search(rf"\b{re.escape(field.split('.')[-1])}\b", message)
    return message if named else f"{field}: {message}"
