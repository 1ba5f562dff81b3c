"""One of several attacks at random for every batch, so that training meets them all."""

from __future__ import annotations

from typing import Any

import torch

from datamodules.batch import AdversarialBatch
from datamodules.fields import NonNegative, checked
from lightning_modules.attacks.base import Attack, AttackedPrompt, load_attack_state, share, state_of
from lightning_modules.models.language_model import LanguageModel


@checked
class Mixture:
    """Draws one attack per batch.

    Args:
        attacks: the attacks.
        weights: how often each is drawn, in proportion; null draws all alike.
    """

    def __init__(self, attacks: list[Attack], weights: list[NonNegative] | None = None) -> None:
        weights = weights or [1.0] * len(attacks)
        if not attacks or len(weights) != len(attacks) or not sum(weights) > 0:
            raise ValueError(
                f"Mixture.weights: expected one weight >= 0 for each of {len(attacks)} attacks, not "
                f"all 0, got {weights}"
            )
        self.attacks = attacks
        self.weights = weights

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Run the drawn attack; without a rng the first. Raises: what that attack raises."""
        if rng is None:
            return self.attacks[0](model, batch)
        drawn = int(torch.multinomial(torch.tensor(self.weights), 1, generator=rng))
        return self.attacks[drawn](model, batch, rng)

    def share(self, model: LanguageModel) -> None:
        """What the attacks have to exchange."""
        for attack in self.attacks:
            share(attack, model)

    def state_dict(self) -> dict[str, Any]:
        """What the attacks keep between batches."""
        return {"attacks": [state_of(attack) for attack in self.attacks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for attack, own in zip(self.attacks, state["attacks"], strict=True):
            load_attack_state(attack, own)
