"""One measuring of a model: jobs of a batch each (attack, reply, judge, append the rows), then the numbers.

Every row is on disk before it counts, so a killed session goes on where it stood, and another judge can be
asked without attacking again. The same session serves `fit`, `validate`, `test` and `thundercat attack`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.health import example_flags
from callbacks.judges.base import Judge, judge_all, label
from callbacks.report.measured import select, snapshot
from callbacks.report.results import Snapshot
from datamodules.batch import EvaluationBatch
from datamodules.evaluation import EvaluationData
from datamodules.results import Identity, Measurement, ResultsStore, Row, Stage, contents, settings_digest
from lightning_modules.attacks.base import Attack, AttackedPrompt
from lightning_modules.models.fingerprint import fingerprint
from lightning_modules.models.language_model import Encoded, LanguageModel
from lightning_modules.models.requests import Decoding


class Measures(Protocol):
    """What a session needs to know of an evaluation."""

    name: str
    schedule: Schedule
    max_new_tokens: int
    seed: int

    def probes(self) -> list[Probe]: ...


@dataclass(frozen=True)
class Place:
    """Which model is measured, where its rows go, and this process's share of the work."""

    model: LanguageModel
    folder: Path
    stage: Stage
    step: int
    """Optimiser step of the model."""
    rank: int = 0
    world_size: int = 1
    precision: str = "32-true"
    """The trainer's: autocast changes replies, and not the weights."""


@dataclass(frozen=True)
class Job:
    """One batch of one measurement."""

    measurement: Measurement
    probe: Probe
    batch: EvaluationBatch
    max_new_tokens: int
    seed: int

    @property
    def title(self) -> str:
        return ": ".join(
            part for part in (self.measurement.evaluation, self.probe.name or self.probe.subject) if part
        )


class Session:
    """The work of some evaluations on one model.

    Args:
        place: the model and its run folder.
        data: the evaluation rows.
        evaluations: what is measured; of two that measure the same, the later one counts.

    Raises: ValueError where an evaluation finds no row of any of its subjects.
    """

    def __init__(self, place: Place, data: EvaluationData, evaluations: Sequence[Measures]) -> None:
        self.place = place
        self.data = data
        self.store = ResultsStore(place.folder, place.rank)
        self.weights = fingerprint(place.model.module)
        self.jobs: list[Job] = []
        self.rows: list[Row] = []
        for evaluation in evaluations:
            for probe in self._present(evaluation):
                measurement, batches = self._planned(evaluation, probe)
                # Every process announces all of it: one without a row of its own counts the others' too.
                self.store.announce([measurement])
                self.jobs += [
                    Job(measurement, probe, batch, evaluation.max_new_tokens, evaluation.seed)
                    for batch in batches
                ]

    def _present(self, evaluation: Measures) -> list[Probe]:
        probes = evaluation.probes()
        present = [probe for probe in probes if self.data.examples[probe.subject]]
        if not present:
            wanted = " or ".join(
                f"data.evaluation.{subject}" for subject in dict.fromkeys(p.subject for p in probes)
            )
            raise ValueError(f"{type(evaluation).__name__}: found no row to evaluate; set {wanted}")
        return present

    def _planned(self, evaluation: Measures, probe: Probe) -> tuple[Measurement, list[EvaluationBatch]]:
        """What a probe measures, over all processes, and this one's batches."""
        own, stage = self.place, self.place.stage
        limits = (evaluation.schedule.rows(stage), probe.limit if stage == "fit" else None)
        limit = min((rows for rows in limits if rows is not None), default=None)
        shares = [
            list(self.data.loader(probe.subject, limit, rank, own.world_size))
            for rank in range(own.world_size)
        ]
        keys = [key for share in shares for batch in share for key in batch.keys]
        repeated = next((key for key, count in Counter(keys).items() if count > 1), None)
        if repeated is not None:
            # Their rows would collapse into one, and n would silently be smaller.
            raise ValueError(
                f"data.evaluation.{probe.subject}: several rows have the key {repeated!r}; rename them"
            )
        measurement = Measurement(
            evaluation=evaluation.name,
            stage=stage,
            step=own.step,
            model=self.weights,
            # A row is another one if its prompt is put differently (template, system message, attackable
            # span), if its target or its batch-mates change, or the seed: all that decides a reply besides
            # the weights. It covers every process's share, so that all agree on it.
            settings=settings_digest(
                probe.attack,
                evaluation.max_new_tokens,
                own.precision,
                evaluation.seed if probe.attack is not None else None,
                [contents(batch) for share in shares for batch in share],
            ),
            subject=probe.subject,
            attack=probe.name,
            quantity=probe.quantity,
            judge=label(probe.judge),
            refusal=label(probe.refusal) if probe.refusal is not None else "",
            judges=[label(judge) for judge in probe.judges],
            n=len(keys),
        )
        return measurement, shares[own.rank]

    def do(self, job: Job) -> list[Row]:
        """The job's rows with all verdicts; the model replies only if a row is missing.

        A batch is attacked whole or not at all: with other batch-mates, rounding could send a discrete search
        another way.
        """
        stored = [self.store.get(_identity(job.measurement, key)) for key in job.batch.keys]
        rows = [row for row in stored if row is not None]
        if len(rows) < len(job.batch):
            new = measure(self.place.model, job)
            rows = [old or row for old, row in zip(stored, new, strict=True)]
        rows = judged(rows, job.probe.asked)
        self.store.add(rows)
        self.rows += rows
        return rows

    def finish(self) -> Snapshot:
        """The model's measures at this step, over all processes and all that was measured so far."""
        for share in _gathered(self.rows):
            self.store.learn(share)
        own = self.place
        assert own.stage != "attack", "one attack is no measurement"
        return snapshot(select(self.store.measurements, self.store, own.stage, own.step), own.stage, own.step)


def measure(model: LanguageModel, job: Job) -> list[Row]:
    """Attack a batch where the job has an attack, and reply: rows without verdicts."""
    own, batch = job.measurement, job.batch.to(model.device)
    began = time.perf_counter()
    attacked = _attacked(model, job.probe.attack, batch, job.seed)
    seconds = (time.perf_counter() - began) / len(batch) if attacked is not None else 0.0
    sent = attacked if attacked is not None else Encoded(batch.prompt_ids, batch.prompt_mask)
    replies = model.reply(sent, Decoding(max_new_tokens=job.max_new_tokens))
    return [
        replace(
            _evidence(model, batch, attacked, i),
            settings=own.settings,
            model=own.model,
            stage=own.stage,
            step=own.step,
            subject=own.subject,
            attack=own.attack,
            example=key,
            prompt=batch.prompts[i],
            system=batch.systems[i] if batch.systems else None,
            expected=batch.expected[i],
            category=batch.categories[i],
            functional=batch.functional[i],
            reply=replies[i],
            seconds=seconds,
        )
        for i, key in enumerate(batch.keys)
    ]


def judged(rows: Sequence[Row], judges: Sequence[Judge]) -> list[Row]:
    """The rows with the verdicts that they lacked; every judge sees them at once."""
    found = list(rows)
    for judge in judges:
        name = label(judge)
        lacking = [i for i, row in enumerate(found) if name not in row.verdicts]
        chosen = [found[i] for i in lacking]
        verdicts = judge_all(
            judge, [r.prompt for r in chosen], [r.reply for r in chosen], [r.expected for r in chosen]
        )
        for i, given in zip(lacking, verdicts, strict=True):
            entry = {"verdict": given.verdict, "score": given.score}
            found[i] = replace(found[i], verdicts={**found[i].verdicts, name: entry})
    return found


def _attacked(
    model: LanguageModel, attack: Attack | None, batch: EvaluationBatch, seed: int
) -> AttackedPrompt | None:
    if attack is None:
        return None
    assert batch.adversarial is not None, "an attack needs rows with a harmful target"
    return attack(model, batch.adversarial, torch.Generator().manual_seed(seed))


def _evidence(model: LanguageModel, batch: EvaluationBatch, attacked: AttackedPrompt | None, i: int) -> Row:
    """What the attack found for its i-th example and what it cost; the rest of the row is empty."""
    histories = (attacked.histories if attacked is not None else ()) or batch.histories
    history = [list(turn) for turn in histories[i]] if histories else []
    empty = Row("", "", "fit", 0, "harmful", "", "", 0, "", None, "", "", "", None, history, "", "")
    if attacked is None:
        return empty
    curve = attacked.loss_curve[:, i].tolist()
    return replace(
        empty,
        attacked=attacked.texts[i] if attacked.texts else None,
        prefill=model.chat.decode(list(attacked.forced[i])) if attacked.forced else "",
        loss_curve=[None if math.isnan(loss) else loss for loss in curve],
        steps=sum(not math.isnan(loss) for loss in curve),
        forward_passes=int(attacked.forward_passes[i]),
        backward_passes=int(attacked.backward_passes[i]),
        queries=0 if attacked.queries is None else int(attacked.queries[i]),
        flags={sign: bool(raised[i]) for sign, raised in example_flags(attacked).items()},
    )


def _identity(own: Measurement, key: str) -> Identity:
    return own.settings, own.model, own.stage, own.step, own.subject, own.attack, key, 0


def _gathered(rows: list[Row]) -> list[list[Row]]:
    """The rows of all processes: every one of them must compute the same numbers, or they would stop at
    different steps."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [rows]
    shares: list[list[Row]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(shares, rows)
    return shares
