"""Circuit breakers by representation rerouting (Zou et al. 2024, arXiv 2406.04313, algorithm 1): losses on
hidden states.

    c_s relu( cos(h, h0) ) on harmful replies  +  c_r || h - h0 ||_2 on utility,   c_s = alpha (1 - t / T'),
    c_r = alpha t / T'

h0 are the starting model's states: what a harmful reply was represented by loses its direction, what utility
was represented by stays.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from datamodules.fields import Count, NonNegativeInt, Positive, checked
from lightning_modules.losses.base import LossTerms, Step
from lightning_modules.models.begun import remaining
from lightning_modules.models.hidden_states import conversation_states, num_layers, reply_states
from lightning_modules.models.likelihood import masked_mean
from lightning_modules.models.reply import Reply


def reroute(
    states: Float[Tensor, "batch token dim"],
    before: Float[Tensor, "batch token dim"],
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, " batch"]:
    """Mean over tokens of relu(cos(h, h0))."""
    return masked_mean(torch.relu(cosine_similarity(states, before, dim=-1)), mask)


def retain(
    states: Float[Tensor, "batch token dim"],
    before: Float[Tensor, "batch token dim"],
    mask: Bool[Tensor, "batch token"],
) -> Float[Tensor, " batch"]:
    """Mean over tokens of the l2 distance || h - h0 ||."""
    # At the start h = h0, where the norm has no gradient: the tiny offset gives it the subgradient 0.
    distance = ((states - before).square().sum(-1) + torch.finfo(states.dtype).tiny).sqrt()
    return masked_mean(distance, mask)


@checked
class CircuitBreakers:
    """Representation rerouting on chosen decoder layers; the means over layers are summed with the two
    schedules.

    Args:
        layers: decoder layers whose outputs are compared, counted from 0 [10 and 20 of 32].
        alpha: scale of both terms [5 to 10].
        horizon: T', the steps after which the schedules have crossed over; null is twice the run's steps [300
            for 150 steps].
    """

    def __init__(
        self, layers: list[NonNegativeInt], alpha: Positive = 10.0, horizon: Count | None = None
    ) -> None:
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(
                f"CircuitBreakers.layers: expected distinct layer numbers counted from 0, got {layers}"
            )
        self.layers = layers
        self.alpha = alpha
        self.horizon = horizon

    def weights(self, step: Step) -> tuple[float, float]:
        """c_s (reroute) and c_r (retain) of this step."""
        progress = min(1.0, step.number / (self.horizon or 2 * step.total))
        return self.alpha * (1 - progress), self.alpha * progress

    def __call__(self, step: Step) -> LossTerms:
        """Raises: ValueError without both streams, or for a layer that the model lacks."""
        harmful, utility = step.batch.adversarial, step.batch.utility
        if harmful is None or utility is None or step.attacked is None:
            raise ValueError(
                "CircuitBreakers: expected harmful and utility rows; set data.harmful_per_step and "
                "data.utility_per_step"
            )
        depth = num_layers(step.model)
        if max(self.layers) >= depth:
            raise ValueError(
                f"CircuitBreakers.layers: expected layers below {depth}, got {self.layers}; the model "
                f"has {depth} layers"
            )
        reply = remaining(Reply(harmful.harmful_ids, harmful.harmful_mask), step.attacked.forced)
        with step.reference.active() as reference:
            # Both models read the attacked prompt: the cosine is to tell the models apart, not the prompts.
            with step.attacked.applied(reference) as embeds:
                harmful_before = reply_states(
                    reference, embeds, step.attacked.prompt_mask, reply, self.layers
                )
            utility_before = conversation_states(
                reference, utility.input_ids, utility.attention_mask, self.layers
            )
        with step.attacked.applied(step.model) as embeds:
            harmful_now = reply_states(step.model, embeds, step.attacked.prompt_mask, reply, self.layers)
        utility_now = conversation_states(step.model, utility.input_ids, utility.attention_mask, self.layers)
        # A reply's last token predicts nothing: the longest of a batch is not fed its own, so no reply's
        # counts, or an example's loss would depend on its batch-mates.
        pairs = zip(harmful_now, harmful_before, strict=True)
        rerouted = torch.stack([reroute(now, before, reply.mask[:, 1:]) for now, before in pairs]).mean(0)
        pairs = zip(utility_now, utility_before, strict=True)
        retained = torch.stack([retain(now, before, utility.attention_mask) for now, before in pairs]).mean(0)
        weight_reroute, weight_retain = self.weights(step)
        loss = weight_reroute * rerouted.mean() + weight_retain * retained.mean()
        parts = {"loss_reroute": rerouted.detach(), "loss_retain": retained.detach()}
        return LossTerms(loss, parts)
