"""Console script `thundercat`: train, evaluate and attack from YAML.

    thundercat fit --config configs/quickstart.yaml --model.attack.epsilon=0.05
    thundercat list attacks
    thundercat report runs/quickstart

Heavy libraries are imported inside the commands: `--version`, `list` and a wrong word are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from callbacks.report.escape import printable
from experiments.config.errors import ConfigError, suggest
from experiments.options import OTHERS, RUNS, Parser, build_parser
from experiments.process import Ended, end_if_asked, listen


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a failed run, 2 for a wrong call or configuration, 130
    for Ctrl-C, 143 for SIGTERM."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except (Ended, KeyboardInterrupt) as stop:
        number = stop.number if isinstance(stop, Ended) else signal.SIGINT
        early = "" if words[:1] == ["report"] else " before anything was run"
        return _fail(words, f"stopped by {signal.Signals(number).name}{early}", 128 + number)
    except BrokenPipeError:
        # Whoever reads our output has gone (`thundercat list | head`): nobody is left to tell.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except (ValueError, OSError) as error:
        return _fail(words, " ".join(str(error).split()), 2)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        remedy = "" if "--traceback" in words else "; run again with --traceback to see where"
        return _fail(words, f"unexpected error {type(error).__name__}: {lines[0]}{remedy}", 1)


def _fail(words: Sequence[str], message: str, status: int) -> int:
    if "--traceback" in words:
        traceback.print_exc()
    print(f"thundercat: {printable(message, one_line=True)}", file=sys.stderr)
    return status


def _run(words: list[str]) -> int:
    parser = build_parser()
    if not words:
        parser.print_help()
        return 0
    known = {**RUNS, **OTHERS}
    if not words[0].startswith("-") and words[0] not in known:
        expected = ", ".join(known)
        raise ConfigError(f"expected a command of {expected}, got {words[0]!r}{suggest(words[0], known)}")
    try:
        call, rest = parser.parse_known_args(words)
    except SystemExit as done:  # --version and --help have printed their text
        return int(done.code or 0)
    _prepare()
    if call.command in RUNS:
        overrides, help_class = split_overrides(rest)
        return _configured(parser, call, overrides, help_class)
    if rest:
        raise ConfigError(f"unknown option {rest[0]!r}; see thundercat {call.command} --help")
    return _other(call)


def _configured(
    parser: Parser, call: argparse.Namespace, overrides: list[tuple[str, str]], help_class: str | None
) -> int:
    """fit, validate, test, predict, attack."""
    from experiments.config.classes import search_working_directory

    search_working_directory()
    if call.help or help_class:
        from experiments.config.help import print_class, print_fields

        if help_class:
            print_class(help_class)
        else:
            print(_subparser(parser, call.command).format_help())
            print_fields(call.config, overrides)
        return 0
    own = [(name, getattr(call, name, None)) for name in ("ckpt_path", "prompt", "target", "document")]
    overrides = [*overrides, *((name, value) for name, value in own if value is not None)]
    flags = [f"--{name}" for name in ("print_config", "overwrite", "traceback") if getattr(call, name, False)]
    if call.command == "plan":
        from experiments.commands.plan import PlanSettings, plan

        settings = {field.name: getattr(call, field.name) for field in dataclasses.fields(PlanSettings)}
        end_if_asked()
        return plan(call.config, overrides, PlanSettings(**settings))
    if call.command == "attack":
        from experiments.commands.attack import attack

        end_if_asked()
        return attack(call.config, overrides, flags)
    from experiments.commands.run import run

    end_if_asked()
    return run(call.command, call.config, overrides, flags)


def split_overrides(rest: Sequence[str]) -> tuple[list[tuple[str, str]], str | None]:
    """(key, value) overrides, and the class of `--help.CLASS`. Raises: ConfigError for what is neither."""
    overrides: list[tuple[str, str]] = []
    help_class = None
    words = list(rest)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            raise ConfigError(f"expected an option, got {word!r}; files are given with --config {word}")
        if not name.startswith("--") or name == "--":
            raise ConfigError(f"unknown option {name!r}; see thundercat --help")
        if name.startswith("--help."):
            help_class = name.removeprefix("--help.")
            continue
        if not equals:
            if not words:
                raise ConfigError(f"{name}: expected a value, got none; write {name}=VALUE")
            value = words.pop(0)
        overrides.append((name[2:], value))
    return overrides, help_class


def _other(call: argparse.Namespace) -> int:
    if call.command == "list":
        from experiments.commands.list import listing

        print(listing(call.kind))
    elif call.command == "chat":
        from experiments.commands.chat import ChatSettings, chat

        own = {field.name: getattr(call, field.name) for field in dataclasses.fields(ChatSettings)}
        own["ckpt_path"] = None if call.ckpt_path == "none" else call.ckpt_path
        return chat(ChatSettings(**own), call.traceback)
    elif call.command == "study":
        from experiments.commands.study import StudyCall, study
        from experiments.config.classes import search_working_directory

        search_working_directory()
        return study(
            StudyCall(**{own.name: getattr(call, own.name) for own in dataclasses.fields(StudyCall)})
        )
    elif call.command == "compare":
        from experiments.commands.compare import CompareCall, compare

        return compare(
            CompareCall(**{own.name: getattr(call, own.name) for own in dataclasses.fields(CompareCall)})
        )
    elif call.command == "sweep":
        from experiments.commands.sweep import SweepCall, sweep
        from experiments.config.classes import search_working_directory

        search_working_directory()
        return sweep(
            SweepCall(**{own.name: getattr(call, own.name) for own in dataclasses.fields(SweepCall)})
        )
    elif call.command == "export":
        from experiments.commands.export import ExportSettings, export

        own = {field.name: getattr(call, field.name) for field in dataclasses.fields(ExportSettings)}
        own["ckpt_path"] = None if call.ckpt_path == "none" else call.ckpt_path
        return export(ExportSettings(**own), call.traceback)
    elif call.command == "schema":
        from experiments.commands.schema import schema_text

        print(schema_text())
    else:
        from callbacks.report.report import write_reports

        print(write_reports(call.run))
    return 0


def _subparser(parser: Parser, command: str) -> argparse.ArgumentParser:
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = action.choices[command]
    return found


def _prepare() -> None:
    """Calm defaults, and silence on what third parties say at every start and nobody can act on."""
    # A spinning OpenMP pool slows every other torch process on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for message in (r".*LeafSpec.*", r".*does not have many workers.*", r".*is_gradient_checkpointing.*"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )


def console() -> Any:
    """Entry point of the console script."""
    listen()
    if "_ARGCOMPLETE" in os.environ:
        from experiments.config.completion import complete

        complete(build_parser())
    sys.exit(main())


if __name__ == "__main__":
    console()
