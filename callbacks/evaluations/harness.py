"""Tasks of EleutherAI's lm-evaluation-harness, with local documents or those of the hub.

Templates, few-shot examples and metrics are the harness's own. Nothing of it is imported before it is needed,
since its index of tasks takes seconds.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datamodules.sources.questions import Question

LOGGERS = ("lm_eval", "datasets")
GROUP_FIELDS = {"group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata"}
"""What a group of tasks may say without changing them."""
TEST, SHOTS = "test", "shots"
"""Names of the splits that local documents are given."""


@dataclass(frozen=True)
class Task:
    """One task of the harness with the documents that are asked."""

    task: Any
    documents: list[tuple[int, str, str]]
    """(index within the task's documents, key, category) of each."""

    @property
    def name(self) -> str:
        return str(self.task.config.task)

    @property
    def metrics(self) -> list[str]:
        """Names of what the task measures."""
        return list(self.task.aggregation())

    @property
    def configuration(self) -> dict[str, Any]:
        """The resolved configuration but for places on this machine."""
        found = self.task.dump_config()
        found.get("metadata", {}).pop("config_source", None)
        return {name: value for name, value in found.items() if name != "custom_dataset"}


def check_installed(what: str) -> None:
    """Raises: ValueError naming the extra where the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"{what} needs lm-eval, which is not installed; pip install 'lm-eval[hf]>=0.4.13' (the project's "
            "extra `benchmarks`)"
        )


def harness_version() -> str:
    """The installed version, which is part of what a number means."""
    return version("lm_eval")


def load_tasks(
    name: str, num_fewshot: int, questions: Sequence[Question] | None, examples: Sequence[Question]
) -> list[Task]:
    """The tasks of a name: one, or the members of a group (mmlu: a task a subject) that have documents.

    Args:
        name: a task or a group of the harness.
        num_fewshot: solved examples in front of every question.
        questions: local documents; null lets the harness load its own from the hub.
        examples: local solved documents.

    Raises: ValueError for an unknown name, a task that is not multiple-choice, or documents that do not fit.
    """
    with quiet():
        leaves = [_configuration(entry) for entry in _entries(name)]
        if questions is None:
            return [_hub_task(config, num_fewshot, len(leaves) > 1) for config in leaves]
        subjects = dict.fromkeys(question.subject for question in questions)
        return [
            _local_task(
                _config_of(leaves, name, subject),
                num_fewshot,
                [own for own in questions if own.subject == subject],
                [own for own in examples if own.subject == subject],
            )
            for subject in subjects
        ]


@contextmanager
def quiet() -> Iterator[None]:
    """What the harness says of itself at every call stays off the terminal; errors come as exceptions."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def listed(value: Any) -> list[Any]:
    """A list as it is, anything else as one of its own."""
    return value if isinstance(value, list) else [value]


@cache
def _index(family: str | None) -> Any:
    """The names that the harness knows, or those in one folder of its tasks: to read them all takes
    seconds."""
    from lm_eval import tasks

    if family is None:
        return tasks.TaskManager().task_index
    folder = Path(tasks.__file__).parent / family
    if not family or not folder.is_dir():
        return {}
    return tasks.TaskManager(include_defaults=False, include_path=str(folder)).task_index


def _entries(name: str) -> list[Any]:
    """The tasks behind a name; groups and tags are followed."""
    entry = _index(name.partition("_")[0]).get(name)
    if entry is None or entry.kind.name == "TAG":  # whose tasks may be in any folder
        entry = _index(None).get(name)
    if entry is None:
        raise ValueError(
            f"benchmarks: the harness knows no task {name!r}; `lm_eval ls tasks` lists those that it knows"
        )
    members = sorted(entry.tags) if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if entry.kind.name == "GROUP" and (
        set(entry.cfg) - GROUP_FIELDS or any(not isinstance(member, str) for member in listed(members))
    ):
        raise ValueError(f"benchmarks: the group {name!r} sets options of its own; name its tasks one by one")
    if entry.kind.name in ("GROUP", "TAG"):
        return [own for member in listed(members) for own in _entries(member)]
    return [entry]


def _configuration(entry: Any) -> dict[str, Any]:
    """A task's whole configuration: an override that is handed to the harness would replace it, not add."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(entry.yaml_path, resolve_func=True)
    if "class" in config or config.get("output_type") != "multiple_choice":
        raise ValueError(
            f"benchmarks: expected a multiple-choice task, got {entry.name!r}, which is none; choose another"
        )
    return {name: value for name, value in config.items() if name not in ("tag", "group", "task_list")}


def _config_of(leaves: Sequence[dict[str, Any]], name: str, subject: str) -> dict[str, Any]:
    """The task that asks about a subject: the harness names it as its data set's configuration."""
    fitting = [config for config in leaves if not subject or config.get("dataset_name") == subject]
    if len(fitting) != 1:
        about = f" about {subject!r}" if subject else ""
        raise ValueError(
            f"benchmarks: {name}: expected one task for the documents{about}, got {len(fitting)}; name "
            "another task, or choose subjects in docs"
        )
    return fitting[0]


def _hub_task(config: dict[str, Any], num_fewshot: int, member: bool) -> Task:
    try:
        task = _built({**config, "num_fewshot": num_fewshot})
    except Exception as error:  # a hub that is out of reach, in any of its libraries' words
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"benchmarks: {config['task']}: cannot load {config.get('dataset_path')!r} from the hub: "
            f"{first}; give its documents as files: docs (datamodules.sources.questions)"
        ) from error
    category = str(config.get("dataset_name") or config["task"]) if member else ""
    return Task(task, [(i, str(i), category) for i in range(len(task.eval_docs))])


def _local_task(
    config: dict[str, Any], num_fewshot: int, questions: Sequence[Question], examples: Sequence[Question]
) -> Task:
    from datasets import Dataset

    shots = dict(config.get("fewshot_config") or {})
    if num_fewshot and not examples and "samples" not in shots:
        raise ValueError(
            f"benchmarks: {config['task']}: num_fewshot is {num_fewshot}, and docs has no solved examples; "
            "set docs.examples_path, or num_fewshot: 0"
        )
    splits = {TEST: Dataset.from_list([own.document for own in questions])}
    if examples:
        splits[SHOTS] = Dataset.from_list([own.document for own in examples])
        shots.pop("split", None)
    own = {
        "custom_dataset": lambda **_: splits,
        "dataset_kwargs": None,
        "test_split": TEST,
        "validation_split": None,
        "training_split": SHOTS if examples else None,
        "fewshot_split": SHOTS if examples else None,
        "num_fewshot": num_fewshot,
        **({"fewshot_config": shots} if shots else {}),
    }
    try:
        task = _built({**config, **own})
    except Exception as error:  # templates fail in many ways on documents of another benchmark
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"benchmarks: {config['task']}: its template does not fit the documents, the first at "
            f"{questions[0].where}: {first}; choose the source of that benchmark as docs"
        ) from error
    if len(task.eval_docs) != len(questions):
        raise ValueError(
            f"benchmarks: {config['task']}: leaves out some of the {len(questions)} documents; set docs: null"
        )
    return Task(task, [(i, question.key, question.subject) for i, question in enumerate(questions)])


def _built(config: dict[str, Any]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config=copy.deepcopy(config))
