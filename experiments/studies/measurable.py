"""Will a study's or a sweep's columns be measured? Asked of the evaluations before the first training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

GCG = "gcg"
"""The attack of a GCGEvaluation."""
FIXED = {"CertificationEvaluation": CERTIFIED, "ReplyChangeEvaluation": AGAINST_BASE}
"""Evaluations whose one set has a name of their own."""
REMEDY = "add it to `test`, or make the column optional"


def check_columns_measured(columns: Mapping[str, Column], config: Mapping[str, Any]) -> None:
    """Attacks, named sets and judges that columns name; an optional column may be missing.

    Args:
        columns: label -> column.
        config: a resolved configuration, as `thundercat test` gets it.

    Raises: ConfigError for one that no evaluation of ours has: it would be missed only after the training.
    """
    suites, attacks = _suites(config), attacks_of(config)
    if attacks is None:
        return
    searched = {f"{attack}{end}" for attack in attacks for end in (TOWARDS_REFUSAL, AWAY_FROM_ANSWER)}
    sets, judges = {*_sets(suites, config)}, _judges(suites)
    for name, column in columns.items():
        if column.optional:
            continue
        _known(f"columns.{name}.attack", column.attack, attacks | searched | {WORST_CASE, WORST_CASE_TEXT})
        _known(f"columns.{name}.block", column.block, sets)
        if judges is not None:
            _known(f"columns.{name}.judge", column.judge, judges)


def attacks_of(config: Mapping[str, Any]) -> frozenset[str] | None:
    """Names of the attacks of a configuration's suites; None where somebody's own evaluation may name things
    in its own way."""
    suites = _suites(config)
    if any(not str(own.get("class_path")).startswith("callbacks.") for own in suites):
        return None
    plain = {attack for own in suites for attack in (own.get("init_args") or {}).get("attacks") or {}}
    return frozenset(plain | {GCG for own in suites if _class(own) == "GCGEvaluation"})


def check_curves(curves: Iterable[str], attacks: Iterable[frozenset[str] | None]) -> None:
    """Raises: ConfigError for a curve of an attack that no run meets: it would be left out in silence."""
    known = [*attacks]
    if None not in known:
        there = frozenset[str]().union(*(own for own in known if own is not None))
        for number, attack in enumerate(curves):
            _known(f"curves.{number}", attack, there, "name an attack of a suite")


def _suites(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*((config.get("trainer") or {}).get("callbacks") or [])]


def _known(place: str, name: str, there: Iterable[str], remedy: str = REMEDY) -> None:
    names = sorted(there)
    if name and name not in names:
        raise ConfigError(f"{place}: {name!r} is in none of its evaluations{suggest(name, names)}; {remedy}")


def _class(own: Mapping[str, Any]) -> str:
    return str(own.get("class_path")).rpartition(".")[2]


def _sets(suites: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> Iterator[str]:
    """Names of sets: of the data's, of benchmarks and texts, and what evaluations call their own."""
    evaluation = ((config.get("data") or {}).get("init_args") or {}).get("evaluation") or {}
    yield from evaluation.get("blocks") or {}
    for own in suites:
        arguments = own.get("init_args") or {}
        yield from arguments.get("texts") or {}
        for benchmark in arguments.get("benchmarks") or []:
            yield Benchmark(**{key: value for key, value in benchmark.items() if key != "docs"}).name
        own_name = getattr(import_class("trainer.callbacks", own["class_path"]), "name", "")
        yield FIXED.get(_class(own)) or str(arguments.get("block") or own_name)


def _judges(suites: Iterable[Mapping[str, Any]]) -> set[str] | None:
    """Labels of the judges beside the deciding ones; None where one has settings, which may change its
    label."""
    found: set[str] = set()
    for own in suites:
        if _class(own) == "InjectionEvaluation":
            found |= {label(TaskKept()), label(AnswerOverlap())}
        for node in (own.get("init_args") or {}).get("judges") or []:
            if node.get("init_args"):
                return None
            found.add(label(import_class("judges", node["class_path"])()))
    return found
