"""PGD on the expected loss under Gaussian noise: the attack that knows embedding smoothing (Salman et al.
2019, arXiv 1906.04584, section 2.2; expectation over transformations)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, Positive, checked
from lightning_modules.attacks.base import AttackedPrompt, example_rngs, require_gradients
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD, target_loss
from lightning_modules.models.embedding_noise import gaussian, noise_std
from lightning_modules.models.language_model import LanguageModel


@checked
class SmoothedPGD:
    """Embedding PGD whose loss is the mean over draws of noise at the attackable positions.

    Args:
        descent: ball, steps and step rule.
        sigma: the noise, as EmbeddingSmoothing.sigma counts it.
        num_draws: draws behind every gradient; new ones at every step.
    """

    def __init__(self, descent: EmbeddingPGD, sigma: Positive = 0.1, num_draws: Count = 8) -> None:
        self.descent = descent
        self.sigma = sigma
        self.num_draws = num_draws

    @torch.enable_grad()
    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch towards its harmful targets. Raises: RuntimeError in inference mode."""
        require_gradients(self)
        radius, step = self.descent.lengths(model)
        rngs = example_rngs(batch, rng)
        with model.frozen():
            clean = model.embed(batch.prompt_ids).detach()
            std = noise_std(model, self.sigma)
            start = torch.zeros_like(clean, dtype=torch.promote_types(clean.dtype, torch.float32))

            def loss(
                point: Float[Tensor, "active prompt dim"], active: Int[Tensor, " active"]
            ) -> Float[Tensor, " active"]:
                drawn = []
                for _ in range(self.num_draws):
                    own = [rngs[row] for row in active.tolist()]
                    noise = std * gaussian(point, batch.attackable_mask[active], own)
                    drawn.append(target_loss(model, batch, clean[active] + point + noise, active))
                return torch.stack(drawn).mean(0)

            found = self.descent.descend(
                loss, start, batch.attackable_mask[..., None], radius, step, self.num_draws
            )
        return found.ledger.attacked(batch.prompt_ids, batch.prompt_mask, found.delta, found.distance)
