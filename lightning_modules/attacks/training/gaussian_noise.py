"""Gaussian noise on the embeddings while training, so that a smoothed model's certificates grow.

Alone the augmentation of Cohen et al. 2019 (arXiv 1902.02918, section 4); around an attack on the smoothed
loss (`SmoothedPGD`) the training of Salman et al. 2019 (arXiv 1906.04584, SmoothAdv).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from datamodules.batch import AdversarialBatch
from datamodules.fields import Positive, checked
from lightning_modules.attacks.base import (
    Attack,
    AttackedPrompt,
    NoAttack,
    derived_rng,
    example_rngs,
    load_attack_state,
    share,
    state_of,
)
from lightning_modules.models.embedding_noise import gaussian, noise_std
from lightning_modules.models.language_model import LanguageModel


@checked
class GaussianNoise:
    """One draw of noise at the attackable positions, on top of what an attack has found.

    Args:
        sigma: the noise, as CertificationEvaluation.sigma counts it.
        attack: an attack on embeddings; null adds noise to the clean prompt.
    """

    def __init__(self, sigma: Positive = 1.0, attack: Attack | None = None) -> None:
        self.sigma = sigma
        self.attack = attack or NoAttack()

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. The evidence is the inner attack's, before the noise; there is no ball that holds
        noise, so that the distance is NaN.

        Raises: ValueError for an inner attack that writes text.
        """
        found = self.attack(model, batch, rng)
        if found.texts or any(found.forced) or found.prompt_ids.shape != batch.prompt_ids.shape:
            raise ValueError(
                "GaussianNoise.attack: expected an attack on the embeddings of the prompt as it is, got "
                f"{type(self.attack).__name__}; use EmbeddingPGD or SmoothedPGD"
            )
        with torch.no_grad():
            clean = model.embed(batch.prompt_ids)
            delta = torch.zeros_like(clean, dtype=torch.float32) if found.delta is None else found.delta
            # Not the attack's own draws over again, with a rng (which has moved on) and without one.
            rngs = example_rngs(batch, rng if rng is not None else derived_rng(0, 1))
            noise = noise_std(model, self.sigma) * gaussian(delta, batch.attackable_mask, rngs)
        return replace(found, delta=delta + noise, distance=torch.full_like(found.distance, torch.nan))

    def share(self, model: LanguageModel) -> None:
        """What the attack has to exchange."""
        share(self.attack, model)

    def state_dict(self) -> dict[str, Any]:
        """What the attack keeps between batches."""
        return {"attack": state_of(self.attack)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_attack_state(self.attack, state["attack"])
