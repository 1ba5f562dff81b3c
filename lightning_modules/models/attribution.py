"""Which of a request's tokens a decision between two replies rests on.

The decision is a margin in nats: log p(opening of a refusal | request) - log p(harmful opening | request).
A token's contribution is the gradient of the margin at its embedding, times what the embedding adds to a
baseline, along the straight path from the baseline to the request (integrated gradients, Sundararajan et al.
2017, arXiv 1703.01365):

    c_t = < x_t - b,  1/S  sum_s  d margin / d x_t  at  b + a_s (x - b) >

With one point at the request and b = 0 it is gradient x input. Models that norm what their layers read see
an embedding's direction and not its length, so that gradient x input says next to nothing of them; hence the
path, and a baseline that is a token like any other: the vocabulary's mean embedding.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import AdversarialBatch
from lightning_modules.models.embeddings import embedding_table
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.reply import Reply

Baseline = Literal["mean", "zero"]


def refusal_margins(
    model: LanguageModel,
    batch: AdversarialBatch,
    prompt_embeds: Float[Tensor, "batch prompt dim"],
    num_tokens: int,
) -> Float[Tensor, " batch"]:
    """log p of the safe reply's first tokens - log p of the harmful one's, given the prompts, in nats.

    Args:
        model: the model.
        batch: prompts with both replies.
        prompt_embeds: stands for the prompts' embeddings.
        num_tokens: tokens of each opening, at most.
    """
    safe = Reply(batch.safe_ids[:, :num_tokens], batch.safe_mask[:, :num_tokens])
    harmful = Reply(batch.harmful_ids[:, :num_tokens], batch.harmful_mask[:, :num_tokens])
    refused, complied = model.reply_log_probs(prompt_embeds, batch.prompt_mask, safe, harmful)
    return refused.sum(1) - complied.sum(1)


def contributions(
    model: LanguageModel, batch: AdversarialBatch, num_tokens: int, num_points: int, baseline: Baseline
) -> tuple[Float[Tensor, "batch prompt"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """What every attackable token adds to the refusal margin, 0 elsewhere; the margin; and the margin with
    all of these tokens at the baseline. The more points, the closer the first sums to the others' difference.

    Args:
        model: the model; its parameters get no gradient.
        batch: prompts with both replies.
        num_tokens: tokens of each opening, at most.
        num_points: of the path, in the middles of as many equal parts of it; 1 is the request itself.
        baseline: what an absent token is.
    """
    with torch.enable_grad(), model.frozen():
        embedded = model.embed(batch.prompt_ids).detach()
        # Summed in fp32 or wider, whatever the weights are.
        whole = embedded if embedded.dtype == torch.float64 else embedded.float()
        mean = embedding_table(model).mean(0).to(whole)
        absent = mean.expand_as(whole) if baseline == "mean" else torch.zeros_like(whole)
        added = torch.where(batch.attackable_mask[..., None], whole - absent, 0.0)
        gradient = torch.zeros_like(added)
        for share in [1.0] if num_points == 1 else [(i + 0.5) / num_points for i in range(num_points)]:
            point = (whole - (1 - share) * added).requires_grad_(True)
            margins = refusal_margins(model, batch, point, num_tokens)
            gradient += torch.autograd.grad(margins.sum(), point)[0] / num_points
        with torch.no_grad():
            margin, without = (
                refusal_margins(model, batch, embeds, num_tokens) for embeds in (whole, whole - added)
            )
        return (gradient * added).sum(2), margin, without
