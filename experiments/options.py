"""The commands of `thundercat` and their own options, without what they run: imported at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from experiments.config.errors import ConfigError

DESCRIPTION = "Console script `thundercat`: train, evaluate and attack from YAML."
RUNS = {
    "fit": "train, with the evaluations that the configuration names",
    "validate": "evaluate on the evaluation sets (all rows)",
    "test": "the same under the name `test`",
    "predict": "write the model's replies to the evaluation prompts to RUN/predictions.jsonl",
    "attack": 'one attack, live: thundercat attack --config FILE --prompt "..." --target "Sure, ..."',
    "plan": "what a training would cost in memory, arithmetic and hours, before it runs; needs no weights",
}
OTHERS = {
    "sweep": "search a configuration's fields: trials, the best of them on test, what mattered",
    "study": "train and judge every run of a study, and compare them",
    "compare": "runs side by side on one page, down to their rows",
    "chat": "talk to a run's model in the terminal",
    "export": "write a run's model: PEFT adapters or merged weights, with a model card",
    "report": "write the reports of a finished run again, from its rows",
    "list": "what there is to choose from, one line each",
    "schema": "a JSON schema of configurations, for editors",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of a call."""

    def __init__(self, prog: str, **settings: Any) -> None:
        settings.setdefault("formatter_class", _formatter)
        super().__init__(prog=prog, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(None if args is None else self._spelt(args), namespace)

    def _spelt(self, words: Iterable[str]) -> Iterator[str]:
        """Options as they are declared, where dashes and underscores are all that differs; behind a bare `--`
        there are none."""
        own = {name.lstrip("-").replace("-", "_"): name for name in self._option_string_actions}
        left = iter(words)
        for word in left:
            if word == "--":
                yield word
                yield from left
                return
            name, equals, value = word.partition("=")
            alike = own.get(name[2:].replace("-", "_")) if name.startswith("--") else None
            yield f"{alike}{equals}{value}" if alike is not None else word

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=28, width=110)


def build_parser() -> Parser:
    """The commands and their own options; every other `--KEY=VALUE` is a field of the configuration."""
    parser = Parser("thundercat", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"thundercat {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, text in RUNS.items():
        _add_run(commands.add_parser(name, help=text, description=text, add_help=False, allow_abbrev=False))
    report = commands.add_parser("report", help=OTHERS["report"], description=OTHERS["report"])
    report.add_argument("run", metavar="RUN", help="run folder, e.g. runs/quickstart")
    _add_sweep(commands.add_parser("sweep", help=OTHERS["sweep"], description=OTHERS["sweep"]))
    _add_study(commands.add_parser("study", help=OTHERS["study"], description=OTHERS["study"]))
    _add_compare(commands.add_parser("compare", help=OTHERS["compare"], description=OTHERS["compare"]))
    _add_chat(commands.add_parser("chat", help=OTHERS["chat"], description=OTHERS["chat"]))
    _add_export(commands.add_parser("export", help=OTHERS["export"], description=OTHERS["export"]))
    listing = commands.add_parser("list", help=OTHERS["list"], description=OTHERS["list"])
    kind = listing.add_argument(
        "kind", nargs="?", default="all", help="attacks, methods, recipes, ...; all by default"
    )
    kind.completer = _kinds  # type: ignore[attr-defined]
    commands.add_parser("schema", help=OTHERS["schema"], description=OTHERS["schema"])
    for other in (
        report,
        listing,
        *(commands.choices[name] for name in ("schema", "chat", "export", "study", "sweep", "compare")),
    ):
        other.add_argument("--traceback", action="store_true", help="show Python's traceback of an error")
    return parser


def _kinds(**_: Any) -> list[str]:
    """For the shell."""
    from experiments.commands.list import CLASSES, FILES

    return ["all", *FILES, *CLASSES]


def _add_study(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("study", metavar="FILE", help="the study's YAML, e.g. configs/study/one_step_tinychat.yaml")
    add("--out", metavar="FOLDER", help="tables, figures, raw rows [RUNS/NAME of the file]")
    add("--runs", metavar="FOLDER", default="runs/studies", help="the run folders [runs/studies]")
    add("--only", metavar="RUN", nargs="+", default=[], help="these runs, and those they need [all]")
    add("--workers", metavar="N", type=int, default=1, help="runs at a time; they share the cores [1]")
    add("--dry_run", action="store_true", help="list the runs, what of them is done, what they cost")
    add("--report_only", action="store_true", help="run nothing: the report of what is done")
    add("--recorded", metavar="FOLDER", help="run nothing: these tables from another report's raw rows")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sweep", metavar="FILE", help="the sweep's YAML, e.g. configs/sweep/cat_tinychat.yaml")
    add(
        "--backend",
        choices=("local", "slurm", "ray", "wandb"),
        default="local",
        help="where trials run, or who searches: wandb [local]",
    )
    add("--workers", metavar="N", type=int, default=1, help="trials at a time; they share the cores [1]")
    add("--runs", metavar="FOLDER", default="runs/sweeps", help="the sweeps' folders [runs/sweeps]")
    add("--dry_run", action="store_true", help="check, and list the trials and what became of them")
    add("--report_only", action="store_true", help="run nothing: the report of what is done")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", nargs="+", help="run folders, or patterns of them: runs/a runs/b 'runs/cat_*'")
    add("--out", metavar="FOLDER", default="runs/compare", help="page, its data, tables [runs/compare]")
    add(
        "--stage",
        choices=("test", "validate", "fit"),
        help="what is shown [the first of these that all runs have]",
    )
    add("--baseline", metavar="RUN", help="run that differences are taken against at first [the first one]")
    add("--csv", action="store_true", help="leaderboard.csv too: every number with judge card and budget")
    add("--markdown", action="store_true", help="leaderboard.md too: the page's own columns")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, e.g. runs/quickstart")
    place = add(
        "--ckpt_path", metavar="PATH|last|none", default="last", help="whose weights; none: before training"
    )
    place.completer = lambda **_: ["last", "none"]  # type: ignore[attr-defined]
    add("--system", metavar="TEXT", help="system message [the run's]")
    add("--max_new_tokens", metavar="N", type=int, default=256, help="longest reply [256]")
    add("--temperature", metavar="T", type=float, default=0.0, help="0 replies greedily [0]")
    add("--top_p", metavar="P", type=float, default=1.0, help="nucleus of sampled replies [1]")
    add("--seed", metavar="N", type=int, default=0, help="of sampled replies [0]")


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, e.g. runs/quickstart")
    place = add(
        "--ckpt_path", metavar="PATH|last|none", default="last", help="whose weights; none: before training"
    )
    place.completer = lambda **_: ["last", "none"]  # type: ignore[attr-defined]
    add("--merged", action="store_true", help="merge adapters into the weights: a model that needs no PEFT")
    add("--folder", metavar="FOLDER", help="where to [RUN/model, merged RUN/model_merged]; it is replaced")


def _add_run(parser: argparse.ArgumentParser) -> None:
    name = parser.prog.split()[-1]
    parser.usage = f"thundercat {name} --config FILE [--config FILE ...] [--KEY=VALUE ...] [options]"
    add = parser.add_argument
    add(
        "-c",
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML file; several are merged in order",
    )
    add("--ckpt_path", metavar="PATH|last", help="checkpoint to continue from (fit) or to evaluate")
    add("--print_config", action="store_true", help="print the resolved configuration and stop")
    if name == "fit":
        add(
            "--overwrite",
            action="store_true",
            help="move an earlier run in this folder aside, to NAME.1, ...",
        )
    if name == "attack":
        add("--prompt", metavar="TEXT", help="the harmful request; with --document the trusted instruction")
        add("--target", metavar="TEXT", help="the affirmative beginning that the attack aims at")
        add(
            "--document",
            metavar="FILE",
            help="a text beside the prompt that nobody vouches for; the attack writes there and nowhere else",
        )
    if name == "plan":
        _add_plan(parser)
    add(
        "-h",
        "--help",
        action="store_true",
        help="this text and every field (of --config, else the quickstart)",
    )
    add(
        "--help.CLASS",
        action="store_true",
        dest="help_class",
        help="fields of one class: --help.EmbeddingPGD",
    )
    add("--traceback", action="store_true", help="show Python's traceback of an error")
    add(
        "--KEY",
        metavar="VALUE",
        dest="_",
        help="one field: --model.attack.epsilon=0.1, --model.attack=NoAttack",
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--devices", metavar="N", type=int, default=1, help="how many devices train together [1]")
    add("--device-memory", metavar="SIZE", default="80GiB", help="memory of one device [80GiB]")
    add("--tflops", metavar="N", type=float, default=700.0, help="10^12 operations a second of one [700]")
    add("--utilisation", metavar="SHARE", type=float, default=0.3, help="share of them that is reached [0.3]")
    add("--prompt-tokens", metavar="N", type=int, help="length of prompts [half of encoding.max_length]")
    add("--reply-tokens", metavar="N", type=int, help="length of replies, likewise")
    add("--json", dest="as_json", action="store_true", help="all figures as JSON")


def _version() -> str:
    try:
        return version("thundercat")
    except PackageNotFoundError:
        return "(not installed)"
