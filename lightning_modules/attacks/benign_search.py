"""A search in an attack's own ball on benign tasks, for what makes the model wrong; what attacks leave behind
without a search, and the search for refusals, are in transfer.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from datamodules.batch import EvaluationBatch
from lightning_modules.attacks.base import Attack, AttackedPrompt
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.transfer import Found, Transfer, aimed
from lightning_modules.models.language_model import LanguageModel


def away_of(attack: Attack) -> Transfer | None:
    """The attack turned away from right answers; None for what is no descent in a ball of embeddings."""
    if not isinstance(attack, EmbeddingPGD) or attack.epsilon is None:
        return None
    return AwayFromAnswer(attack)


@dataclass
class AwayFromAnswer:
    """A search in the attack's ball for what makes the model wrong on a benign task. Accuracy under it is an
    upper bound of the robust accuracy of Madry et al. (2018): the reply to the point of the highest loss is
    judged, and a stronger search may find another."""

    descent: EmbeddingPGD

    def __call__(
        self, model: LanguageModel, batch: EvaluationBatch, found: Found, rng: torch.Generator
    ) -> AttackedPrompt:
        """Raises: ValueError for a prompt without a right answer."""
        unanswered = next((k for k, right in zip(batch.keys, batch.expected, strict=True) if not right), None)
        if unanswered is not None:
            raise ValueError(f"{unanswered}: expected a right answer to attack, got none; leave the row out")
        return self.descent.away(model, aimed(model, batch, batch.expected, found.attackable), rng)
