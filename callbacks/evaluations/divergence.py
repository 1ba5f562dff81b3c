"""How far training moves the model at every token of the harmful reply: how deep its alignment reaches.

KL(run || base) at each token of the target, given the request and the target's earlier tokens (Qi et al.,
arXiv 2406.05946, section 2.2, whose aligned models differ from their base in the first few tokens alone). A
defence that moves those only is undone by prefilling them. A row is a token of a target; its repetition is
the token's number, from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from callbacks.evaluations.asking import Work
from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.dealing import dealt_out
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place
from callbacks.evaluations.undisturbed import undisturbed
from datamodules.batch import EvaluationBatch
from datamodules.fields import Count, checked
from datamodules.result_lines import Identity, Measurement, Row
from datamodules.settings import contents, settings_digest
from lightning_modules.losses.distributions import token_kl
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.logits import reply_logits
from lightning_modules.models.reply import Reply

DIVERGENCE = "kl_to_base@1"
"""In a judge's place; its score is the KL divergence in nats."""


@checked
class DivergenceEvaluation(Evaluation):
    """KL divergence of the run's model from its base at the first tokens of the harmful targets.

    Args:
        schedule: when it runs and on how many requests; null takes the defaults.
        positions: tokens of a target, at most; a shorter target has fewer.
    """

    name = "divergence"

    def __init__(self, schedule: Schedule | None = None, positions: Count = 20) -> None:
        super().__init__(schedule)
        self.positions = positions

    def probes(self) -> list[Probe]:
        """None: nothing is replied."""
        return []

    def work(self, place: Place, weights: str) -> list[tuple[Measurement, list[Work]]]:
        """One measurement; its batches are dealt out to the processes."""
        data, base, key = self.began(place)
        if not data.rows_of("harmful"):
            raise ValueError(
                "DivergenceEvaluation: found no request with a target; set data.evaluation.harmful"
            )
        shares = dealt_out(data, "harmful", self.schedule.rows(place.stage), place.world_size)
        batches = [batch for share in shares for batch in share]
        measurement = place.measurement(
            self.name,
            weights,
            settings=settings_digest(
                DIVERGENCE, key, self.positions, place.precision, [contents(batch) for batch in batches]
            ),
            subject="harmful",
            quantity="divergence",
            judge=DIVERGENCE,
            n=sum(map(len, batches)),
            block=self.name,
        )
        own: list[Work] = [Compared(measurement, batch, base, self.positions) for batch in shares[place.rank]]
        return [(measurement, own)]


@dataclass(frozen=True)
class Compared:
    """One batch of requests whose targets both models read."""

    measurement: Measurement
    batch: EvaluationBatch
    base: Reference
    positions: int

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def title(self) -> str:
        return f"{self.measurement.evaluation}: {self.measurement.subject}"

    @property
    def lengths(self) -> list[int]:
        """Tokens of every target that are compared."""
        batch = self.batch.adversarial
        assert batch is not None  # harmful rows have targets
        return [min(self.positions, int(n)) for n in batch.harmful_mask.sum(1)]

    @property
    def identities(self) -> list[Identity]:
        return [
            self.measurement.identity(key, position)
            for key, length in zip(self.batch.keys, self.lengths, strict=True)
            for position in range(length)
        ]

    def replied(self, model: LanguageModel) -> list[Row]:
        """A row a token of every target."""
        batch, own, lengths = self.batch.to(model.device), self.measurement, self.lengths
        nats = divergences(model, self.base, batch, max(lengths)).tolist()
        rows = []
        for i, length in enumerate(lengths):
            for position in range(length):
                found = nats[i][position]
                score = found if math.isfinite(found) else None
                verdicts: dict[str, dict[str, bool | float | None]] = {
                    DIVERGENCE: {"verdict": False, "score": score}
                }
                row = own.row(batch.keys[i], batch.prompts[i], batch.expected[i], verdicts=verdicts)
                row.repetition, row.category = position, batch.categories[i]
                rows.append(row)
        return rows


@torch.no_grad()
def divergences(
    model: LanguageModel, base: Reference, batch: EvaluationBatch, positions: int
) -> Float[Tensor, "batch position"]:
    """KL(model || base) in nats at the first tokens of the targets; 0 beyond a target's end.

    Raises: ValueError where the two vocabularies differ.
    """
    targets = batch.adversarial
    assert targets is not None
    reply = Reply(targets.harmful_ids[:, :positions], targets.harmful_mask[:, :positions])

    def logits(asked: LanguageModel) -> Float[Tensor, "scored vocabulary"]:
        return reply_logits(asked, asked.embed(targets.prompt_ids), targets.prompt_mask, reply)

    with undisturbed(model.module):
        own = logits(model)
        with base.alike() as before:
            known = logits(before)
    found = own.new_zeros(reply.mask.shape)
    found[reply.mask] = token_kl(own, known)
    return found
