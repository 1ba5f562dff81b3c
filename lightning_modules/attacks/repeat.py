"""Repeat a randomised attack and keep each example's best run."""

from __future__ import annotations

from dataclasses import replace

import torch

from datamodules.batch import AdversarialBatch
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.models.language_model import LanguageModel


class Restarts:
    """Runs an EmbeddingPGD with random starts `num_restarts` times; the lowest best loss per example wins,
    costs add up.

    Args:
        attack: the attack to repeat; it must start at random and keep the best iterate.
        num_restarts: number of runs.
    """

    def __init__(self, attack: EmbeddingPGD, num_restarts: int = 5) -> None:
        if num_restarts < 1:
            raise ValueError(
                f"Restarts.num_restarts: expected >= 1, got {num_restarts}; set at least one run"
            )
        if not attack.random_start or attack.keep != "best":
            raise ValueError(
                "Restarts.attack: expected random_start true and keep 'best', got "
                f"{attack.random_start} and {attack.keep!r}; "
                "set attack.init_args.random_start: true and keep: best, otherwise every run is the same"
            )
        self.attack = attack
        self.num_restarts = num_restarts

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        rng = rng or torch.Generator().manual_seed(0)
        best = self.attack(model, batch, rng)
        for _ in range(self.num_restarts - 1):
            best = _better(best, self.attack(model, batch, rng))
        return best


def _better(old: AttackedPrompt, new: AttackedPrompt) -> AttackedPrompt:
    wins = new.best_loss < old.best_loss
    assert old.delta is not None and new.delta is not None
    rows = max(len(old.loss_curve), len(new.loss_curve))
    curves = [
        torch.cat([c, c.new_full((rows - len(c), c.shape[1]), torch.nan)])
        for c in (old.loss_curve, new.loss_curve)
    ]
    return replace(
        old,
        delta=torch.where(wins[:, None, None], new.delta, old.delta),
        loss_curve=torch.where(wins, curves[1], curves[0]),
        forward_passes=old.forward_passes + new.forward_passes,
        backward_passes=old.backward_passes + new.backward_passes,
        distance=torch.where(wins, new.distance, old.distance),
        zero_gradient=old.zero_gradient & new.zero_gradient,
    )
