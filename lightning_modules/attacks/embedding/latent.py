"""Latent PGD: projected gradient descent on the residual stream of chosen layers (Sheshadri et al. 2024,
arXiv 2407.15549)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, Fraction, NonNegativeInt, Positive, checked
from lightning_modules.attacks.base import AttackedPrompt, require_gradients
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD, RadiusUnit, StepRule, StepUnit, target_loss
from lightning_modules.models.hidden_states import num_layers, perturbed_layers
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy, unlikelihood
from lightning_modules.models.reply import Reply


@checked
class LatentPGD:
    """PGD on the outputs of decoder layers (and the embeddings) at the attackable positions, each within its
    own ball.

    Args:
        layers: decoder layers whose output is perturbed, counted from 0.
        embedding: also perturb the embeddings.
        epsilon: radius per token and site in `radius_unit`; null is no ball.
        radius_unit: `absolute`, as in the paper, or `embedding_norm`.
        ball: `l2` or `linf`.
        num_steps: number of gradient steps.
        step_size: size of one step in `step_unit`.
        step_unit: `radius`, `embedding_norm` or `absolute`.
        step_rule: `sign`, `l2` or `adam`.
        keep: `best` or `last` iterate.
        weight_safe: share of the adversary's loss that pushes away from the safe reply, -mean log(1 - p) of
            it; the rest is CE of the harmful target [0.5 in targeted LAT]. The batch then needs safe replies.
    """

    def __init__(
        self,
        layers: list[NonNegativeInt],
        embedding: bool = True,
        epsilon: Positive | None = 6.0,
        radius_unit: RadiusUnit = "absolute",
        ball: Literal["l2", "linf"] = "l2",
        num_steps: Count = 16,
        step_size: Positive = 0.25,
        step_unit: StepUnit = "radius",
        step_rule: StepRule = "l2",
        keep: Literal["best", "last"] = "best",
        weight_safe: Fraction = 0.0,
    ) -> None:
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(
                f"LatentPGD.layers: expected distinct layer numbers counted from 0, got {layers}"
            )
        self.layers = layers
        self.weight_safe = weight_safe
        self.embedding = embedding
        self.descent = EmbeddingPGD(
            epsilon=epsilon,
            num_steps=num_steps,
            step_size=step_size,
            step_unit=step_unit,
            step_rule=step_rule,
            radius_unit=radius_unit,
            ball=ball,
            keep=keep,
        )

    @torch.enable_grad()
    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. Raises: RuntimeError in inference mode, ValueError for a layer that the model
        lacks."""
        require_gradients(self)
        depth = num_layers(model)
        if max(self.layers) >= depth:
            raise ValueError(
                f"LatentPGD.layers: expected layers below {depth}, got {self.layers}; the model has "
                f"{depth} layers"
            )
        radius, step = self.descent.lengths(model)
        sites = len(self.layers) + self.embedding
        with model.frozen():
            clean = model.embed(batch.prompt_ids).detach()
            # The sites stand one after the other in the token dimension, so that each token of each has its
            # own ball.
            wide = torch.promote_types(clean.dtype, torch.float32)
            delta = torch.zeros(
                len(clean), sites * clean.shape[1], clean.shape[2], dtype=wide, device=clean.device
            )
            allowed = batch.attackable_mask.repeat(1, sites)[..., None]

            def loss(
                point: Float[Tensor, "active site_token dim"], active: Int[Tensor, " active"]
            ) -> Float[Tensor, " active"]:
                embedding, layers = self._split(point)
                with perturbed_layers(model, layers):
                    return self._loss(
                        model,
                        batch,
                        clean[active] if embedding is None else clean[active] + embedding,
                        active,
                    )

            num_replies = 1 if self.weight_safe == 0 else 2
            found = self.descent.descend(loss, delta, allowed, radius, step, num_replies)
        embedding, layers = self._split(found.delta)
        attacked = found.ledger.attacked(batch.prompt_ids, batch.prompt_mask, embedding, found.distance)
        return replace(attacked, layers=layers)

    def _loss(
        self,
        model: LanguageModel,
        batch: AdversarialBatch,
        embeds: Float[Tensor, "active prompt dim"],
        active: Int[Tensor, " active"],
    ) -> Float[Tensor, " active"]:
        """What the adversary minimises."""
        if self.weight_safe == 0:
            # As in EmbeddingPGD: without a weight the safe replies need not be there, nor cost a pass.
            return target_loss(model, batch, embeds, active)
        replies = [
            Reply(batch.harmful_ids, batch.harmful_mask, tuple(own.harmful for own in batch.lengths)),
            Reply(batch.safe_ids, batch.safe_mask, tuple(own.safe for own in batch.lengths)),
        ]
        prompts = batch.prompt_mask
        if len(active) < len(batch):
            replies = [Reply(reply.ids[active], reply.mask[active]) for reply in replies]
            prompts = prompts[active]
        harmful, safe = model.reply_log_probs(embeds, prompts, *replies)
        towards, away = mean_cross_entropy(harmful, replies[0].mask), unlikelihood(safe, replies[1].mask)
        return (1 - self.weight_safe) * towards + self.weight_safe * away

    def _split(
        self, delta: Float[Tensor, "row site_token dim"]
    ) -> tuple[Float[Tensor, "row prompt dim"] | None, dict[int, Float[Tensor, "row prompt dim"]]]:
        """What is added to the embeddings, and to each layer's output."""
        parts = list(delta.chunk(len(self.layers) + self.embedding, dim=1))
        embedding = parts.pop(0) if self.embedding else None
        return embedding, dict(zip(self.layers, parts, strict=True))
