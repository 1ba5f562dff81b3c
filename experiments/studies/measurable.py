"""Will a study's or a sweep's columns be measured? Asked of evaluations before the first training, by what
their configuration says: nothing is built. What only a run can tell (an attack that cannot be done to benign
prompts, a judge with settings of its own) is not refused here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from callbacks.evaluations.benchmark import Benchmark
from callbacks.evaluations.benign import AWAY_FROM_ANSWER, TOWARDS_REFUSAL
from callbacks.evaluations.certification import BLOCK as CERTIFIED
from callbacks.evaluations.reply_change import BLOCK as AGAINST_BASE
from callbacks.judges.base import label
from callbacks.judges.injection import AnswerOverlap, TaskKept
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT
from experiments.config.classes import import_class
from experiments.config.errors import ConfigError, suggest
from experiments.studies.definition import Column

Node = Mapping[str, Any]
GCG_SUITE = ("direct", "initial_suffix", "gcg")
"""The attacks of a GCGEvaluation."""
BENIGN = ("over_refusal_rate", "exact_match")
"""Quantities of benign prompts that carry an attack."""
PLAIN = {
    "refusal_rate": "RefusalEvaluation",
    "over_refusal_rate": "RefusalEvaluation",
    "exact_match": "UtilityEvaluation",
}
"""Who measures a quantity without an attack, of the data's own rows."""
OF_ATTACKS = {
    "success_rate",
    "not_refused_rate",
    "success_at_1",
    "success_at_k",
    "not_refused_at_k",
    "loss_start",
    "loss_best",
    "forced_refusal_rate",
    "robust_accuracy",
}
"""Quantities that exist under an attack alone."""
OF_SETS = {
    "accuracy": ("BenchmarkEvaluation",),
    "served_rate": ("BlockEvaluation", "WordingEvaluation"),
    "full_refusal_rate": ("XSTestEvaluation",),
    "partial_refusal_rate": ("XSTestEvaluation",),
    "certified_rate": ("CertificationEvaluation",),
    "direction": ("DirectionEvaluation",),
    "divergence": ("DivergenceEvaluation",),
    "refusal_margin": ("AttributionEvaluation",),
    "word_perplexity": ("PerplexityEvaluation",),
    "byte_perplexity": ("PerplexityEvaluation",),
    "token_perplexity": ("PerplexityEvaluation",),
}
"""Quantities of a named set alone, and who measures them."""
EFFORTS = {"passes_per_example", "queries_per_example", "seconds_per_example"}
"""Of attacks, too; of what they cost."""
SUBJECTS = dict.fromkeys(OF_ATTACKS - {"loss_start", "loss_best"}, "harmful") | {
    "refusal_rate": "harmful",
    "over_refusal_rate": "harmless",
    "forced_refusal_rate": "harmless",
    "exact_match": "utility",
    "robust_accuracy": "utility",
}
"""Whose prompts a quantity is of, where that is settled."""
REMEDY = "add it to the evaluations (of a study: to `test`), or make the column optional"


def check_columns_measured(columns: Mapping[str, Column], config: Mapping[str, Any]) -> None:
    """Attacks, named sets, judges and quantities that columns name; an optional column may be missing.

    Args:
        columns: label -> column.
        config: a resolved configuration, as `thundercat test` gets it.

    Raises: ConfigError for one that no evaluation of ours has: it would be missed only after the training.
    """
    suites = _suites(config)
    if suites is None:
        return
    sets, judges = _sets(suites, config), _judges(suites)
    classes = {_class(own) for own in suites}
    for name, column in columns.items():
        _check_possible(f"columns.{name}", column)
        if column.optional:
            continue
        _known(f"columns.{name}.attack", column.attack, _attacks(suites, column.quantity))
        if sets is not None:
            _known(f"columns.{name}.block", column.block, sets)
        if judges is not None:
            _known(f"columns.{name}.judge", column.judge, judges)
        asked = OF_SETS.get(column.quantity, ())
        if column.quantity in PLAIN and not column.attack and not column.block:
            asked = (PLAIN[column.quantity],)
        if asked and classes.isdisjoint(asked):
            raise ConfigError(
                f"columns.{name}.quantity: {column.quantity!r} is in none of its evaluations; add a "
                f"{' or a '.join(asked)}, or make the column optional"
            )


def _check_possible(place: str, column: Column) -> None:
    """Raises: ConfigError for a column that none of our evaluations could ever measure."""
    own = column.quantity
    if column.subject != SUBJECTS.get(own, column.subject):
        raise ConfigError(f"{place}.subject: {own!r} is of {SUBJECTS[own]} prompts, got {column.subject!r}")
    if own in OF_ATTACKS | EFFORTS and not column.attack:
        raise ConfigError(f"{place}.attack: {own!r} is measured under an attack; name one")
    if column.attack and own not in {*OF_ATTACKS, *EFFORTS, *BENIGN, "judged_rate"}:
        raise ConfigError(f"{place}.attack: {own!r} is not measured under an attack; leave it out")
    if own in OF_SETS and not column.block:
        raise ConfigError(f"{place}.block: {own!r} is measured of a named set; name it")


def attacks_of(config: Mapping[str, Any]) -> frozenset[str] | None:
    """Names of the attacks of a configuration's suites; None where somebody's own evaluation may name things
    in its own way."""
    suites = _suites(config)
    return None if suites is None else frozenset(own for suite in suites for own in _named(suite))


def check_curves(curves: Iterable[str], attacks: Iterable[frozenset[str] | None]) -> None:
    """Raises: ConfigError for a curve of an attack that no run meets: it would be left out in silence."""
    known = [*attacks]
    if None not in known:
        there = frozenset[str]().union(*(own for own in known if own is not None))
        for number, attack in enumerate(curves):
            _known(f"curves.{number}", attack, there, "name an attack of a suite")


def _known(place: str, name: str, there: Iterable[str], remedy: str = REMEDY) -> None:
    names = sorted(there)
    if name and name not in names:
        raise ConfigError(f"{place}: {name!r} is in none of its evaluations{suggest(name, names)}; {remedy}")


def _suites(config: Mapping[str, Any]) -> list[Node] | None:
    """Our evaluations; None where there may be somebody's own. Lightning's callbacks measure nothing."""
    found = (config.get("trainer") or {}).get("callbacks") or []
    every = [found] if isinstance(found, Mapping) else [*found]
    others = [own for own in every if not str(own.get("class_path")).startswith("lightning.")]
    ours = all(str(own.get("class_path")).startswith("callbacks.") for own in others)
    return others if ours else None


def _class(own: Node) -> str:
    return str(own.get("class_path")).rpartition(".")[2]


def _arguments(own: Node) -> Node:
    found: Node = own.get("init_args") or {}
    return found


def _named(suite: Node) -> list[str]:
    return [*(GCG_SUITE if _class(suite) == "GCGEvaluation" else _arguments(suite).get("attacks") or {})]


def _attacks(suites: Sequence[Node], quantity: str) -> set[str]:
    """What a column of this quantity may name as its attack."""
    found: set[str] = set()
    for suite in suites:
        names, benign = _named(suite), _arguments(suite).get("benign")
        if quantity == "forced_refusal_rate":
            turned = benign is not None and benign.get("towards_refusal", True)
            found |= {f"{name}{TOWARDS_REFUSAL}" for name in names if turned}
        elif quantity == "robust_accuracy":
            found |= {f"{name}{AWAY_FROM_ANSWER}" for name in (benign or {}).get("away_from_answer") or []}
        elif quantity not in BENIGN or benign is not None:
            found |= {*names}
    if quantity in ("success_rate", "not_refused_rate") and sum(len(_named(suite)) for suite in suites) > 1:
        found |= {WORST_CASE, WORST_CASE_TEXT}
    return found


def _sets(suites: Sequence[Node], config: Mapping[str, Any]) -> set[str] | None:
    """Named sets that some evaluation measures; None where the data is not ours, whose sets are not known."""
    data = config.get("data") or {}
    if not str(data.get("class_path")).startswith("datamodules."):
        return None
    there = [*(((data.get("init_args") or {}).get("evaluation") or {}).get("blocks") or {})]
    found: set[str] = set()
    for suite in suites:
        own = _class(suite)
        found |= {*SETS[own](_arguments(suite), there)} if own in SETS else set()
    return found


def _all_or_listed(arguments: Node, there: Sequence[str]) -> Sequence[str]:
    return there if arguments.get("sets") is None else [own for own in arguments["sets"] if own in there]


def _benchmarks(arguments: Node, there: Sequence[str]) -> Sequence[str]:
    return [
        Benchmark(**{key: value for key, value in own.items() if key != "docs"}).name
        for own in arguments.get("benchmarks") or []
    ]


SETS: Mapping[str, Callable[[Node, Sequence[str]], Iterable[str]]] = {
    "AttributionEvaluation": lambda own, there: ["attribution"],
    "BenchmarkEvaluation": _benchmarks,
    "BlockEvaluation": _all_or_listed,
    "CertificationEvaluation": lambda own, there: [CERTIFIED],
    "DivergenceEvaluation": lambda own, there: ["divergence"],
    "DirectionEvaluation": lambda own, there: ["direction"],
    "MTBenchEvaluation": lambda own, there: [own.get("block", "mt_bench")],
    "PerplexityEvaluation": lambda own, there: own.get("texts") or (),
    "ReplyChangeEvaluation": lambda own, there: [AGAINST_BASE],
    "WordingEvaluation": lambda own, there: [own.get("plain", ""), own.get("reworded", "")],
    "XSTestEvaluation": lambda own, there: [own.get("block", "xstest")],
}
"""Evaluation -> the sets that it measures, of its arguments and of the data's own sets."""


def _judges(suites: Iterable[Node]) -> set[str] | None:
    """Labels of the judges beside the deciding ones; None where one has settings, which may change its
    label."""
    found: set[str] = set()
    for suite in suites:
        if _class(suite) == "InjectionEvaluation":
            found |= {label(TaskKept()), label(AnswerOverlap())}
        for node in _arguments(suite).get("judges") or []:
            if node.get("init_args"):
                return None
            found.add(label(import_class("judges", node["class_path"])()))
    return found
