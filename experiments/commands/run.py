"""From a resolved configuration to a running Trainer: strict checks first, then LightningCLI, then the
command."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningCLI

from callbacks.report.report import RunReport
from callbacks.run_folder.loggers import LastLogRow, LogConfiguration
from callbacks.run_folder.provenance import Provenance, start_record
from experiments.config.check import check
from experiments.config.compose import ConfigError, compose
from experiments.config.defaults import with_defaults


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
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if not files:
        raise ConfigError("expected at least one --config FILE; start with --config configs/quickstart.yaml")
    config = compose(files, overrides)
    check(config, command)
    config = with_defaults(config)
    if "--print_config" in flags:
        print(yaml.safe_dump(config, sort_keys=False), end="")
        return 0
    if command == "fit" and config.get("ckpt_path") is None:
        start_record(config["trainer"]["default_root_dir"])
    try:
        cli = instantiate(config)
    except ConfigError:
        if "--traceback" in flags:
            traceback.print_exc()
        raise
    if command == "fit":
        # The evaluation callbacks keep their own clock inside `fit`; Lightning's validation loop is for
        # `validate`.
        cli.trainer.limit_val_batches = 0
    use_tqdm(cli.trainer)
    cli.trainer.callbacks[:0] = [Provenance(config), LastLogRow(), LogConfiguration(config)]  # type: ignore[attr-defined]
    return _execute(cli, command, config.get("ckpt_path"), "--traceback" in flags)


def instantiate(config: dict[str, Any]) -> ThundercatCLI:
    """Parse types and build trainer, module and datamodule; no model is loaded yet."""
    # The parser turns the lists of what it is given into its own kind of mapping, in place.
    settings = copy.deepcopy({key: value for key, value in config.items() if key != "ckpt_path"})
    try:
        with warnings.catch_warnings():
            # Lightning's own use of an older jsonargparse interface.
            os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
            # The arguments are this configuration, not sys.argv, and that is meant.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            return ThundercatCLI(settings, run=False)
    except SystemExit as error:
        raise ConfigError(f"the configuration was refused (exit status {error.code})") from error
    except Exception as error:  # jsonargparse wraps every constructor's error in its own
        raise ConfigError(innermost(error)) from error


def _execute(cli: ThundercatCLI, command: str, ckpt_path: str | None, show_traceback: bool) -> int:
    try:
        # Where a report prints its table, Lightning's own of every logged number would bury it.
        reported = any(isinstance(callback, RunReport) for callback in cli.trainer.callbacks)  # type: ignore[attr-defined]
        quiet = {"verbose": False} if command in ("validate", "test") and reported else {}
        result = getattr(cli.trainer, command)(
            cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path, **quiet
        )
    except (ValueError, FileNotFoundError, OSError, FloatingPointError) as error:
        if show_traceback:
            traceback.print_exc()
        print(f"thundercat: {error}", file=sys.stderr)
        return 1
    if command == "predict":
        from experiments.commands.predictions import write_predictions

        print(write_predictions(cli.trainer.default_root_dir, result))
    return 1 if cli.trainer.interrupted else 0


def use_tqdm(trainer: Trainer) -> None:
    """One kind of progress bar: the evaluations' are tqdm's, and rich's bar redraws over them."""
    for i, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        if isinstance(callback, RichProgressBar):
            trainer.callbacks[i] = TQDMProgressBar()  # type: ignore[attr-defined]


def innermost(error: BaseException) -> str:
    """The cause at the bottom of a chain of parser errors, on one line, with the field's name in front."""
    text = str(error)
    key = re.search(r'(?:Parser key|Validation failed: Key|key) "([^"]+)"', text)
    cause: BaseException = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    inner = [line.strip(" -") for line in str(cause).splitlines() if line.strip()]
    message = inner[-1] if inner else type(cause).__name__
    field = key.group(1) if key else ""
    return message if not field or field.split(".")[-1] in message else f"{field}: {message}"
