"""Console script `thundercat`: fit | validate | test | predict | attack from YAML, and report for a finished
run.

thundercat fit --config configs/quickstart.yaml --model.attack.epsilon=0.05
thundercat fit --config configs/experiment/cat_tinychat.yaml --config my_changes.yaml --print_config
thundercat report runs/quickstart
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

COMMANDS = ("fit", "validate", "test", "predict", "attack", "report")
USAGE = """usage: thundercat COMMAND [options]

commands:
  fit        train, with the evaluations that the configuration names
  validate   evaluate on the evaluation sets (all rows)
  test       the same under the name `test`
  predict    write the model's replies to the evaluation prompts to RUN/predictions.jsonl
  attack     one attack, live: thundercat attack --config FILE --prompt "..." --target "Sure, ..."
  report     write the report of a finished run again: thundercat report RUN

options of fit, validate, test, predict and attack:
  --config FILE, -c FILE   a YAML file; give several to merge them in order
  --KEY=VALUE              override one field, e.g. --model.attack.epsilon=0.1 or --model.attack=NoAttack
  --ckpt_path PATH|last    continue from (fit) or evaluate (others) a checkpoint; `last` is the run's newest
  --overwrite              fit in a folder that holds a run: the old one is renamed NAME.1, NAME.2, ...
  --print_config           print the resolved configuration and stop
  --help                   this text and every field of the configuration (the quickstart's if none is given)
  --help.CLASS             the fields of one class, e.g. --help.EmbeddingPGD
  --traceback              show Python's traceback of an error
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a failed run, 2 for a wrong call or configuration."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"thundercat: expected a command of {', '.join(COMMANDS)}, got {command!r}", file=sys.stderr)
        return 2
    # A spinning OpenMP pool slows every other torch process on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _hush()
    from experiments.config.compose import ConfigError

    try:
        if command == "report":
            return _report(rest)
        if command == "attack" and not any(
            word.startswith(("--help", "-h", "--print_config")) for word in rest
        ):
            from experiments.commands.attack import attack

            return attack(*split_arguments(rest))
        from experiments.commands.run import run

        return run(command, *split_arguments(rest))
    except ConfigError as error:
        print(f"thundercat: {error}", file=sys.stderr)
        return 2


def _hush() -> None:
    """Silence what third parties say at every start and nobody can act on."""
    for message in (r".*LeafSpec.*", r".*does not have many workers.*", r".*is_gradient_checkpointing.*"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Config files, (key, value) overrides and bare flags. Raises: ConfigError for what is none of them."""
    from experiments.config.compose import ConfigError

    files: list[str] = []
    overrides: list[tuple[str, str]] = []
    flags: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            raise ConfigError(f"expected an option, got {word!r}; files are given with --config {word}")
        if name in ("--print_config", "--help", "-h", "--traceback", "--overwrite") or name.startswith(
            "--help."
        ):
            flags.append(word)
            continue
        if not equals:
            if not rest:
                raise ConfigError(f"{name}: expected a value, got none; write {name}=VALUE")
            value = rest.pop(0)
        if name in ("--config", "-c"):
            files.append(value)
        elif name.startswith("--"):
            overrides.append((name[2:], value))
        else:
            raise ConfigError(f"unknown option {name!r}; see thundercat --help")
    return files, overrides, flags


def _report(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(
            "usage: thundercat report RUN\n\nwrites results.json, report.md and report.html in the "
            "run folder from its evaluations"
        )
        return 0 if arguments[:1] in (["--help"], ["-h"]) else 2
    from callbacks.report.report import write_report
    from experiments.config.compose import ConfigError

    try:
        print(write_report(arguments[0]))
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    return 0


def console() -> Any:
    """Entry point of the console script."""
    sys.exit(main())


if __name__ == "__main__":
    console()
