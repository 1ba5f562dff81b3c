"""One of several attacks at random for every batch, so that training meets them all."""

from __future__ import annotations

import torch

from datamodules.batch import AdversarialBatch
from lightning_modules.attacks.base import Attack, AttackedPrompt
from lightning_modules.models.victim import Victim


class Mixture:
    """Draws one attack per batch.

    Args:
        attacks: the attacks.
        weights: how often each is drawn, in proportion; null draws all alike.
    """

    def __init__(self, attacks: list[Attack], weights: list[float] | None = None) -> None:
        weights = weights or [1.0] * len(attacks)
        if not attacks or len(weights) != len(attacks) or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"Mixture.weights: expected one weight >= 0 for each of {len(attacks)} attacks, not all 0, got {weights}")
        self.attacks = attacks
        self.weights = weights

    def __call__(self, victim: Victim, batch: AdversarialBatch, generator: torch.Generator | None = None) -> AttackedPrompt:
        """Run the drawn attack; without a generator the first. Raises: what that attack raises."""
        if generator is None:
            return self.attacks[0](victim, batch)
        drawn = int(torch.multinomial(torch.tensor(self.weights), 1, generator=generator))
        return self.attacks[drawn](victim, batch, generator)
