"""Unconstrained soft prompt: embeddings appended to the user's text and optimised freely; an upper bound of
any suffix attack."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, NonNegativeInt, Positive, checked
from lightning_modules.attacks.base import AttackedPrompt, StopLoss
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD, StepRule
from lightning_modules.models.language_model import LanguageModel


@checked
class SoftPrompt:
    """Appends `num_tokens` free embeddings after the last attackable token and runs unconstrained PGD on them
    alone.

    Args:
        num_tokens: number of appended embeddings.
        init_token_id: token whose embedding every slot starts from.
        num_steps: number of gradient steps.
        step_size: size of one step in `step_unit`.
        step_unit: `embedding_norm` (multiples of the mean embedding norm) or `absolute`.
        step_rule: `sign`, `l2` or `adam`, as in EmbeddingPGD.
        stop_loss: an example whose loss falls below this leaves the batch; null never.
    """

    def __init__(
        self,
        num_tokens: Count = 20,
        init_token_id: NonNegativeInt = 0,
        num_steps: Count = 100,
        step_size: Positive = 1e-3,
        step_unit: Literal["embedding_norm", "absolute"] = "embedding_norm",
        step_rule: StepRule = "sign",
        stop_loss: StopLoss | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.init_token_id = init_token_id
        self.descent = EmbeddingPGD(
            epsilon=None,
            num_steps=num_steps,
            step_size=step_size,
            step_unit=step_unit,
            step_rule=step_rule,
            stop_loss=stop_loss,
        )

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        return self.descent(model, append_slots(batch, self.num_tokens, self.init_token_id), rng)


def append_slots(batch: AdversarialBatch, num_tokens: int, token_id: int) -> AdversarialBatch:
    """The batch with `num_tokens` new prompt tokens after each row's last attackable token; only they are
    attackable."""
    length = batch.prompt_ids.shape[1]
    position = torch.arange(length, device=batch.prompt_ids.device)
    last = torch.where(batch.attackable_mask, position, -1).amax(1, keepdim=True)
    # Old tokens up to the cut keep their place; later ones move right by num_tokens.
    target = position + num_tokens * (position > last)

    def widen(values: Tensor, fill: int) -> Tensor:
        wide = torch.full((len(values), length + num_tokens), fill, dtype=values.dtype, device=values.device)
        return wide.scatter(1, target, values)

    slots = widen(torch.zeros_like(batch.prompt_mask), 1)
    return replace(
        batch,
        prompt_ids=widen(batch.prompt_ids, token_id),
        prompt_mask=widen(batch.prompt_mask, 1),
        attackable_mask=slots,
        lengths=(),
    )
