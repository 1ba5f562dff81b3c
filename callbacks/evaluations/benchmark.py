"""Standard benchmarks through EleutherAI's lm-evaluation-harness, on the model in memory with its adapters.

Every document is a row (subject `utility`, a block a benchmark, quantity `accuracy`), so that n, intervals,
groups and the paired difference before and after training come as those of all other measurements.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning import LightningModule, Trainer

from callbacks.evaluations.asking import Work
from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.harness import Task, check_installed, harness_version, load_tasks
from callbacks.evaluations.harness_scoring import Item, Scorer, ask
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place
from callbacks.evaluations.undisturbed import undisturbed
from datamodules.fields import Count, NonNegativeInt, checked
from datamodules.result_lines import Identity, Measurement, Row
from datamodules.settings import settings_digest
from datamodules.sources.gather import evenly
from datamodules.sources.questions import QuestionSource
from lightning_modules.models.language_model import LanguageModel

log = logging.getLogger(__name__)

CHUNK = 50
"""Documents between two writes: what a kill costs at most."""


@checked
@dataclass
class Benchmark:
    """One task of the harness, and how it is asked."""

    task: str
    """Task or group of tasks in the harness, e.g. arc_easy or mmlu; prompts and choices are its own."""
    docs: QuestionSource | None = None
    """Local files of its documents; null loads them from the hub."""
    metric: Literal["acc", "acc_norm"] = "acc"
    """The likeliest choice, or the likeliest per character."""
    num_fewshot: NonNegativeInt = 0
    """Solved examples in front of every question."""
    chat_template: bool = False
    """Ask through the model's chat template; otherwise in plain text."""
    limit: Count | None = None
    """Use at most so many documents, evenly spaced; null uses all."""
    batch_size: Count = 16
    """Choices that are scored at once."""

    @property
    def name(self) -> str:
        """Of the benchmark in tables: two ways of asking have two."""
        parts = [self.task]
        parts += ["acc_norm"] if self.metric == "acc_norm" else []
        parts += ["chat"] if self.chat_template else []
        parts += [f"{self.num_fewshot}shot"] if self.num_fewshot else []
        return "_".join(parts)


@checked
class BenchmarkEvaluation(Evaluation):
    """Accuracy on multiple-choice benchmarks.

    Args:
        benchmarks: what is asked.
        schedule: when it runs and on how many documents of each; null takes the defaults.

    Raises: ValueError where lm-eval is not installed, nothing is asked, or one thing twice.
    """

    name = "benchmarks"

    def __init__(self, benchmarks: list[Benchmark], schedule: Schedule | None = None) -> None:
        super().__init__(schedule)
        check_installed("BenchmarkEvaluation")
        repeated = [name for name, n in Counter(own.name for own in benchmarks).items() if n > 1]
        if repeated or not benchmarks:
            got = f"{repeated[0]!r} twice" if repeated else "none"
            raise ValueError(
                f"BenchmarkEvaluation.benchmarks: expected one or several, no two alike, got {got}"
            )
        self.benchmarks = benchmarks
        self._tasks: dict[str, list[Task]] = {}

    def probes(self) -> list[Probe]:
        """None: the questions are not the evaluation data's."""
        return []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: ValueError for a task or a file that is none, before anything is trained."""
        super().setup(trainer, pl_module, stage)
        with undisturbed(pl_module):
            for benchmark in self.benchmarks:
                self._loaded(benchmark)

    def work(self, place: Place, weights: str) -> list[tuple[Measurement, list[Work]]]:
        """One measurement a benchmark; its chunks are dealt out to the processes in turn."""
        found: list[tuple[Measurement, list[Work]]] = []
        dealt = 0
        with undisturbed(place.model.module):
            for benchmark in self.benchmarks:
                measurement, chunks = self._planned(benchmark, place, weights)
                own = [c for i, c in enumerate(chunks, start=dealt) if i % place.world_size == place.rank]
                dealt += len(chunks)
                found.append((measurement, list(own)))
        return found

    def _loaded(self, benchmark: Benchmark) -> list[Task]:
        if benchmark.name not in self._tasks:
            docs = benchmark.docs
            questions = docs.questions() if docs is not None else None
            examples = docs.examples() if docs is not None and benchmark.num_fewshot else []
            tasks = load_tasks(benchmark.task, benchmark.num_fewshot, questions, examples)
            lacking = [task.name for task in tasks if benchmark.metric not in task.metrics]
            if lacking:
                raise ValueError(
                    f"benchmarks: {lacking[0]} has no metric {benchmark.metric!r}; it has "
                    f"{[name for name in tasks[0].metrics if name in ('acc', 'acc_norm')]}"
                )
            self._tasks[benchmark.name] = tasks
        return self._tasks[benchmark.name]

    def _planned(
        self, benchmark: Benchmark, place: Place, weights: str
    ) -> tuple[Measurement, list[BenchmarkChunk]]:
        limits = [n for n in (benchmark.limit, self.schedule.rows(place.stage)) if n is not None]
        tasks = _limited(self._loaded(benchmark), min(limits, default=None))
        scorer = Scorer(place.model, benchmark.batch_size)
        items = ask(tasks, scorer.chat if benchmark.chat_template else None)
        encoded = [scorer.encoded(item) for item in items]
        cut = sum(len(ids) > scorer.harness.max_length + 1 for ids in encoded)
        if cut and place.rank == 0:
            log.warning(
                "%s: %d of %d documents are longer than the model's %d tokens; their beginnings are cut off",
                benchmark.name,
                cut,
                len(items),
                scorer.harness.max_length,
            )
        judge = f"{benchmark.metric}@lm_eval-{harness_version()}"
        measurement = place.measurement(
            self.name,
            weights,
            settings=settings_digest(
                judge,
                place.precision,
                _digest([task.configuration for task in tasks]),
                _digest([[*item.sent, ids] for item, ids in zip(items, encoded, strict=True)]),
            ),
            subject="utility",
            quantity="accuracy",
            judge=judge,
            n=len(items),
            block=benchmark.name,
        )
        chunks = place.parts(items, CHUNK)
        return measurement, [BenchmarkChunk(measurement, benchmark.metric, own, scorer) for own in chunks]


@dataclass(frozen=True)
class BenchmarkChunk:
    """Some documents of a benchmark."""

    measurement: Measurement
    metric: str
    items: Sequence[Item]
    scorer: Scorer

    def __len__(self) -> int:
        return len(self.items)

    @property
    def title(self) -> str:
        return f"{self.measurement.evaluation}: {self.measurement.block}"

    @property
    def identities(self) -> list[Identity]:
        return [self.measurement.identity(item.key) for item in self.items]

    def replied(self, model: LanguageModel) -> list[Row]:
        """A row a document: the likeliest choice as the reply."""
        own = self.measurement
        with undisturbed(model.module):
            outcomes = self.scorer.outcomes(self.items, self.metric)
        return [
            own.row(
                item.key,
                item.prompt,
                item.expected,
                category=item.category,
                reply=chosen,
                verdicts={own.judge: {"verdict": right, "score": None}},
            )
            for item, (chosen, right) in zip(self.items, outcomes, strict=True)
        ]


def _limited(tasks: Sequence[Task], limit: int | None) -> list[Task]:
    """At most so many documents of all tasks together, evenly spaced."""
    every = [(i, document) for i, task in enumerate(tasks) for document in task.documents]
    chosen = evenly(every, limit)
    kept = [Task(task.task, [own for j, own in chosen if j == i]) for i, task in enumerate(tasks)]
    return [task for task in kept if task.documents]


def _digest(things: list[Any]) -> str:
    """Of texts as they are: none of them names a file."""
    text = json.dumps(
        things, sort_keys=True, default=lambda thing: getattr(thing, "__qualname__", str(thing))
    )
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
