"""One batch of a measurement: attack, reply, rows; and the judges' verdicts on rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from callbacks.evaluations.probe import Probe
from callbacks.evaluations.sampling import sample_seed
from callbacks.health import example_flags
from callbacks.judges.base import Judge, compared_with, judge_all, label, sees
from datamodules.batch import EvaluationBatch
from datamodules.result_lines import Identity, Measurement, Row
from datamodules.text.spans import Attackable
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.transfer import Found
from lightning_modules.defences.base import Defence, Defended, Marked, counts, marked, requests_of
from lightning_modules.models.language_model import Encoded, LanguageModel
from lightning_modules.models.requests import Decoding, Request


class Work(Protocol):
    """A part of a measurement that an evaluation does by itself: its rows come with their verdicts."""

    @property
    def measurement(self) -> Measurement: ...

    @property
    def title(self) -> str:
        """What the progress bar says."""
        ...

    @property
    def identities(self) -> list[Identity]:
        """Of all its rows, in the order in which `replied` returns them."""
        ...

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def replied(self, model: LanguageModel) -> list[Row]:
        """All of its rows."""
        ...


@runtime_checkable
class JudgesApart(Protocol):
    """Work whose rows come without verdicts: they are on disk before a judge is asked."""

    def judged(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the verdicts that they lacked, as far as the judge could be asked."""
        ...


@dataclass(frozen=True)
class Job:
    """One batch of one measurement."""

    measurement: Measurement
    probe: Probe
    batch: EvaluationBatch
    max_new_tokens: int
    seed: int

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def title(self) -> str:
        probe = self.probe
        what = f"{probe.name}, {probe.subject}" if probe.transfer is not None else probe.name or probe.subject
        return ": ".join(part for part in (self.measurement.evaluation, probe.block, what) if part)

    @property
    def identities(self) -> list[Identity]:
        """Of all its rows, by example and then by repetition."""
        own = self.measurement
        return [own.identity(key, n) for key in self.batch.keys for n in range(1 + own.samples)]


def attack(model: LanguageModel, job: Job, found: Found | None = None) -> AttackedPrompt | None:
    """What the job's attack makes of its batch; None without an attack.

    Args:
        found: what the attack has found on harmful requests, for jobs that do it to benign prompts.

    Raises: NothingCarried where what it found cannot be done to other prompts.
    """
    own, batch = job.probe.attack, job.batch.to(model.device)
    rng = torch.Generator().manual_seed(job.seed)
    if job.probe.transfer is not None:
        assert found is not None, "an attack on benign prompts needs what it found on harmful ones"
        return job.probe.transfer(model, batch, found, rng)
    if own is None:
        return None
    assert batch.adversarial is not None, "an attack needs rows with a harmful target"
    return own(model, batch.adversarial, rng)


def measure(
    model: LanguageModel,
    job: Job,
    make: Callable[[], AttackedPrompt | None] | None = None,
    defence: Defence | None = None,
    attackable: Attackable = "user",
) -> list[Row]:
    """Attack the job's batch and reply to it: rows without verdicts.

    Args:
        make: makes the attacked prompts; null attacks the batch.
        defence: what stands around the model that replies; an attack meets the model itself unless it was
            made to see through the defence.
        attackable: what attacks on texts have written.
    """
    began = time.perf_counter()
    attacked = attack(model, job) if make is None else make()
    seconds = round((time.perf_counter() - began) / len(job.batch), 6) if attacked is not None else 0.0
    return replied(model, job, attacked, seconds, defence, attackable)


def replied(
    model: LanguageModel,
    job: Job,
    attacked: AttackedPrompt | None,
    seconds: float = 0.0,
    defence: Defence | None = None,
    attackable: Attackable = "user",
) -> list[Row]:
    """The greedy reply to every prompt, and after it the sampled ones; what the attack cost stands with the
    first."""
    batch, sampling = job.batch.to(model.device), job.probe.sampling
    said = _said(model, batch, attacked, defence, attackable)
    answers = [said(Decoding(job.max_new_tokens), 0)]
    for repetition in range(1, 1 + job.measurement.samples):
        assert sampling is not None, "sampled replies need a way of sampling"
        seed = sample_seed(job.seed, batch.keys[0], repetition)
        answers.append(said(sampling.decoding(job.max_new_tokens), seed))
    rows = []
    for i in range(len(batch)):
        plain = _row(model, job, batch, attacked, i)
        first = replace(plain, **answers[0][i], seconds=seconds)
        free = replace(
            first,
            loss_curve=[],
            steps=0,
            forward_passes=0,
            backward_passes=0,
            queries=0,
            seconds=0.0,
            flags={},
        )
        rows += [first, *(replace(free, repetition=n, **answers[n][i]) for n in range(1, len(answers)))]
    return rows


def _said(
    model: LanguageModel,
    batch: EvaluationBatch,
    attacked: AttackedPrompt | None,
    defence: Defence | None,
    attackable: Attackable,
) -> Callable[[Decoding, int], list[dict[str, Any]]]:
    """What replies to a batch, through a defence where there is one: the rows' fields that it fills in."""
    if defence is None:
        sent = attacked if attacked is not None else Encoded(batch.prompt_ids, batch.prompt_mask)
        return lambda decoding, seed: [{"reply": reply} for reply in model.reply(sent, decoding, seed)]
    around, requests = Defended(model, defence), requests_of(batch, attacked, attackable)
    prompts: Sequence[Request] | Marked = requests
    if attacked is not None and not attacked.texts:
        prompts = marked(model, requests, attacked)
    elif attacked is not None and attacked.forced:
        starts = [model.chat.decode(list(own)) for own in attacked.forced]
        prompts = [replace(own, prefill=start) for own, start in zip(requests, starts, strict=True)]
    return lambda decoding, seed: [
        {"reply": answer.reply, "counts": counts(model, request, answer)}
        for request, answer in zip(requests, around.answers(prompts, decoding, seed), strict=True)
    ]


def relabelled(rows: Sequence[Row], job: Job) -> list[Row]:
    """Stored rows of a job with what its data says of them now, which decides no reply. Verdicts on a row
    whose expected reply is another one are dropped: they compared with the old."""
    found = []
    for number, row in enumerate(rows):
        i = number // (1 + job.measurement.samples)
        own, batch = replace(row), job.batch
        own.category, own.functional = batch.categories[i], batch.functional[i]
        if own.expected != batch.expected[i]:
            own.expected, own.verdicts = batch.expected[i], {}
        found.append(own)
    return found


def judged(rows: Sequence[Row], judges: Sequence[Judge]) -> list[Row]:
    """The rows with the verdicts that they lacked; every judge sees them at once."""
    found = list(rows)
    for judge in judges:
        name = label(judge)
        lacking = [i for i, row in enumerate(found) if name not in row.verdicts]
        chosen = [found[i] for i in lacking]
        prompts = [_read_by(judge, row) for row in chosen]
        compared = [compared_with(judge, r) for r in chosen]
        verdicts = judge_all(judge, prompts, [r.reply for r in chosen], compared)
        for i, given in zip(lacking, verdicts, strict=True):
            entry = {"verdict": given.verdict, "score": given.score}
            found[i] = replace(found[i], verdicts={**found[i].verdicts, name: entry})
    return found


def _read_by(judge: Judge, row: Row) -> str:
    """The prompt that the judge asks for; embeddings cannot be read, so the request stands for them."""
    return row.attacked if sees(judge) == "attacked" and row.attacked is not None else row.prompt


def _row(
    model: LanguageModel, job: Job, batch: EvaluationBatch, attacked: AttackedPrompt | None, i: int
) -> Row:
    """The i-th example's row but for its reply: what was asked, what the attack found and what it cost."""
    histories = (attacked.histories if attacked is not None else ()) or batch.histories
    plain = job.measurement.row(
        batch.keys[i],
        batch.prompts[i],
        batch.expected[i],
        system=batch.systems[i] if batch.systems else None,
        category=batch.categories[i],
        functional=batch.functional[i],
        history=[list(turn) for turn in histories[i]] if histories else [],
        document=batch.documents[i] if batch.documents else None,
        answer=batch.answers[i] if batch.answers else "",
        forbidden=batch.forbidden[i] if batch.forbidden else "",
    )
    if attacked is None:
        return plain
    curve = attacked.loss_curve[:, i].tolist()
    return replace(
        plain,
        attacked=attacked.texts[i] if attacked.texts else None,
        prefill=model.chat.decode(list(attacked.forced[i])) if attacked.forced else "",
        loss_curve=[None if math.isnan(loss) else _shortest(loss) for loss in curve],
        steps=sum(not math.isnan(loss) for loss in curve),
        forward_passes=int(attacked.forward_passes[i]),
        backward_passes=int(attacked.backward_passes[i]),
        queries=0 if attacked.queries is None else int(attacked.queries[i]),
        flags={sign: bool(raised[i]) for sign, raised in example_flags(attacked).items()},
    )


def _shortest(loss: float) -> float:
    """In the fewest digits that tell a single-precision loss from its neighbours: as doubles, a third of a
    packed file of rows would be digits that nobody measured."""
    return float(str(np.float32(loss)))
