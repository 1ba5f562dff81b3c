"""One measuring of a model: jobs of a batch each (attack, reply, judge, append the rows), then the numbers.

Every row is on disk before it counts, so a killed session goes on where it stood, and another judge can be
asked without attacking again. The same session serves `fit`, `validate`, `test` and `thundercat attack`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch

from callbacks.evaluations.asking import Job, JudgesApart, Work, attack, judged, measure, relabelled
from callbacks.evaluations.dealing import dealt_out
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.judges.base import label
from callbacks.report.measured import select
from callbacks.report.results import Snapshot
from callbacks.report.snapshots import snapshot
from datamodules.batch import AdversarialBatch, EvaluationBatch
from datamodules.evaluation import EvaluationData, Subject
from datamodules.result_lines import Measurement, Row, Stage
from datamodules.results import ResultsStore
from datamodules.settings import contents, settings_digest
from datamodules.text.encoding import EncodedHarmful
from datamodules.text.spans import writable
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.transfer import Found, FreeSuffix, NothingCarried
from lightning_modules.defences.base import Defence
from lightning_modules.defences.base import label as defence_label
from lightning_modules.models.fingerprint import fingerprint
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import LanguageModel

log = logging.getLogger(__name__)


class Measures(Protocol):
    """What a session needs to know of an evaluation."""

    name: str
    schedule: Schedule
    max_new_tokens: int
    seed: int

    def probes(self) -> list[Probe]: ...


T = TypeVar("T")


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
    base: Reference | None = None
    """The model before training, for what compares with it."""
    defence: Defence | None = None
    """What stands around the model."""

    def measurement(
        self,
        evaluation: str,
        weights: str,
        *,
        settings: str,
        subject: Subject,
        quantity: str,
        judge: str,
        n: int,
        attack: str = "",
        refusal: str = "",
        judges: Sequence[str] = (),
        samples: int = 0,
        block: str = "",
        against: str = "",
    ) -> Measurement:
        """What an evaluation sets out to measure of this model; the fields are Measurement's.

        Args:
            weights: fingerprint of the model.
        """
        return Measurement(
            evaluation=evaluation,
            stage=self.stage,
            step=self.step,
            model=weights,
            settings=settings,
            subject=subject,
            attack=attack,
            quantity=quantity,
            judge=judge,
            refusal=refusal,
            judges=list(judges),
            n=n,
            samples=samples,
            block=block,
            against=against,
            defence=defence_label(self.defence),
        )

    def parts(self, items: Sequence[T], size: int) -> list[Sequence[T]]:
        """Items in their order, at most `size` together, in no fewer parts than there are processes.

        Lightning's loop needs one for each of them; one without would leave the others waiting.
        """
        size = min(size, max(1, len(items) // self.world_size))
        return [items[start : start + size] for start in range(0, len(items), size)]


@runtime_checkable
class BringsWork(Protocol):
    """An evaluation whose questions are not the evaluation data's rows."""

    def work(self, place: Place, weights: str) -> list[tuple[Measurement, list[Work]]]:
        """What it measures, over all processes, each with this process's parts of it.

        Args:
            weights: fingerprint of the model.
        """
        ...


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
        # By what it was called when the rows were announced: they are found again by it.
        self._around = defence_label(place.defence)
        self.data = data
        self.store = ResultsStore(place.folder, place.rank)
        self.weights = fingerprint(place.model.module)
        self.jobs: list[Job | Work] = []
        self.rows: list[Row] = []
        self._results: dict[str, AttackedPrompt] = {}
        """What transfers of embeddings need: an attack's result on its first batch, by its settings."""
        for evaluation in evaluations:
            if isinstance(evaluation, BringsWork):
                if place.defence is not None:
                    log.warning(
                        "%s: left out behind %s: it measures the model itself, not replies through a defence",
                        evaluation.name,
                        place.defence.name,
                    )
                    continue
                for measurement, share in evaluation.work(place, self.weights):
                    self.store.announce([measurement])
                    self.jobs += share
                continue
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
        blocks = list(self.data.blocks)
        unknown = next((p.block for p in probes if p.block and p.block not in blocks), None)
        if unknown is not None:
            raise ValueError(
                f"{type(evaluation).__name__}: expected a named set {unknown!r}, got {sorted(blocks)}; set "
                f"data.evaluation.blocks.{unknown}"
            )
        everywhere = [
            replace(probe, block=block, blocks=False)
            for probe in probes
            for block in (blocks if probe.blocks else [probe.block])
        ]
        present = [
            probe
            for probe in everywhere
            if self.data.rows_of(probe.subject, probe.block)
            and (probe.transfer is None or self.data.examples["harmful"])
        ]
        if not present:
            wanted = " or ".join(
                f"data.evaluation.{'blocks.NAME.' if blocked else ''}{subject}"
                for blocked, subject in dict.fromkeys((p.blocks, p.subject) for p in probes)
            )
            raise ValueError(f"{type(evaluation).__name__}: found no row to evaluate; set {wanted}")
        return present

    def _planned(self, evaluation: Measures, probe: Probe) -> tuple[Measurement, list[EvaluationBatch]]:
        """What a probe measures, over all processes, and this one's batches."""
        own, stage = self.place, self.place.stage
        limits = (evaluation.schedule.rows(stage), probe.limit if stage == "fit" else probe.test_limit)
        limit = min((rows for rows in limits if rows is not None), default=None)
        shares = dealt_out(self.data, probe.subject, limit, own.world_size, probe.block, probe.against)
        n = sum(len(batch) for share in shares for batch in share)
        further: list[object] = [] if probe.sampling is None else [probe.sampling]
        further += [own.defence] if own.defence is not None else []
        further += [probe.block] if probe.block else []
        if probe.transfer is not None:
            further += [probe.transfer, self._donors(probe)[0].measurement.settings, self._refusals()]
        measurement = own.measurement(
            evaluation.name,
            self.weights,
            # A row is another one if its prompt is put differently (template, system message, attackable
            # span), if its target or its batch-mates change, or the seed: all that decides a reply besides
            # the weights. It covers every process's share, so that all agree on it.
            settings=settings_digest(
                probe.attack,
                evaluation.max_new_tokens,
                own.precision,
                evaluation.seed if probe.attack is not None else None,
                [contents(batch) for share in shares for batch in share],
                *further,
                own_run=own.folder,
            ),
            subject=probe.subject,
            attack=probe.name,
            quantity=probe.quantity,
            judge=label(probe.judge),
            refusal=label(probe.refusal) if probe.refusal is not None else "",
            judges=[label(judge) for judge in probe.judges],
            n=n,
            samples=probe.sampling.k if probe.sampling is not None else 0,
            block=probe.block,
            against=probe.against,
        )
        return measurement, shares[own.rank]

    @property
    def _probing(self) -> list[Job]:
        return [job for job in self.jobs if isinstance(job, Job)]

    def do(self, job: Job | Work) -> list[Row]:
        """The job's rows with all verdicts; the model replies only if a row is missing. A batch is attacked
        whole or not at all: with other batch-mates, rounding could send a discrete search another way."""
        stored = [self.store.get(identity) for identity in job.identities]
        rows = [row for row in stored if row is not None]
        if len(rows) < len(stored):
            try:
                new = self._measured(job) if isinstance(job, Job) else job.replied(self.place.model)
            except NothingCarried:
                # Known only now that the attack has run: there is nothing to measure.
                self.store.announce([replace(job.measurement, n=0)])
                return []
            rows = [old or row for old, row in zip(stored, new, strict=True)]
        if isinstance(job, Job):
            rows = judged(relabelled(rows, job), job.probe.asked)
        elif isinstance(job, JudgesApart):
            # What a judge costs comes after what the model has said is safe.
            self.store.add(rows)
            rows = job.judged(rows)
        self.store.add(rows)
        self.rows += rows
        return rows

    def _measured(self, job: Job) -> list[Row]:
        model, probe, around = self.place.model, job.probe, self.place.defence
        span = self.data.encoding.attackable
        if probe.transfer is not None:
            return measure(model, job, lambda: attack(model, job, self._found(probe)), around, span)
        wanted = any(
            isinstance(other.probe.transfer, FreeSuffix) and other.probe.attack is probe.attack
            for other in self._probing
        )
        if wanted and self._donors(probe)[0] is job:
            return measure(model, job, lambda: self._attacked(job)[1], around, span)
        return measure(model, job, None, around, span)

    def _donors(self, probe: Probe) -> list[Job]:
        """This process's jobs of an attack on harmful requests, whose findings benign prompts get.

        Raises: ValueError where a process has none.
        """
        own = [j for j in self._probing if j.probe.attack is probe.attack and j.probe.transfer is None]
        if not own or own[0].measurement.n < self.place.world_size:
            raise ValueError(
                f"{probe.name}: expected a harmful request for each of {self.place.world_size} processes, "
                "since what it finds there is done to benign prompts; raise the limits of its rows, or set "
                "benign: null"
            )
        return own

    def _found(self, probe: Probe) -> Found:
        """What an attack has found on this process's harmful requests."""
        donors = self._donors(probe)
        rows = [self.store.get(identity) for job in donors for identity in job.identities]
        span = self.data.encoding.attackable
        sent = [
            (writable(span, row.prompt, row.document), row.attacked)
            for row in rows
            if row is not None and not row.repetition and row.attacked
        ]
        targets = [row.expected for row in rows if row is not None]
        return Found(sent, lambda: self._attacked(donors[0]), targets, self._refusals(), span)

    def _attacked(self, job: Job) -> tuple[AdversarialBatch, AttackedPrompt]:
        """An attack's result on its first batch: the same seed gives the same bits, so that a resumed
        session gets what the killed one had."""
        settings, batch = job.measurement.settings, job.batch.to(self.place.model.device).adversarial
        if settings not in self._results:
            found = attack(self.place.model, job)
            assert found is not None, "only attacks are done to other prompts"
            self._results[settings] = found
        assert batch is not None, "an attack needs rows with a harmful target"
        return batch, self._results[settings]

    def _refusals(self) -> list[str]:
        harmful = self.data.examples["harmful"]
        return [e.row.safe_reply for e in harmful if isinstance(e, EncodedHarmful)]

    def finish(self) -> Snapshot:
        """The model's measures at this step, over all processes and all that was measured so far."""
        for share in _gathered(self.rows):
            self.store.learn(share)
        own = self.place
        assert own.stage != "attack", "one attack is no measurement"
        measurements = [item for item in self.store.measurements if item.defence == self._around]
        return snapshot(select(measurements, self.store, own.stage, own.step), own.stage, own.step)


def _gathered(rows: list[Row]) -> list[list[Row]]:
    """The rows of all processes: every one of them must compute the same numbers, or they would stop at
    different steps."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [rows]
    shares: list[list[Row]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(shares, rows)
    return shares
