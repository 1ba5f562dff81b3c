"""Whole next-token distributions of replies, and what greedy decoding would say."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.models.decoder import decode, logits_of, weight_dtype
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.masks import positions_of
from lightning_modules.models.reply import Reply, predictors


def reply_logits(
    model: LanguageModel,
    prompt_embeds: Float[Tensor, "batch prompt dim"],
    prompt_mask: Bool[Tensor, "batch prompt"],
    reply: Reply,
) -> Float[Tensor, "scored vocabulary"]:
    """fp32 logits that predict the replies' tokens, in the order of `reply.mask`."""
    hidden = decode_continued(model, prompt_embeds, prompt_mask, reply)
    length = prompt_embeds.shape[1]
    return logits_of(model.module, predictors(hidden, reply, length, length)[reply.mask])


def labelled_logits(
    model: LanguageModel,
    input_ids: Int[Tensor, "batch token"],
    attention_mask: Bool[Tensor, "batch token"],
    labels: Int[Tensor, "batch token"],
) -> tuple[Float[Tensor, "scored vocabulary"], Bool[Tensor, "batch token-1"]]:
    """fp32 logits that predict the labelled tokens of whole conversations, and where those stand."""
    scored = labels[:, 1:] != -100
    hidden = decode(model.module, model.embed(input_ids), attention_mask, positions_of(attention_mask))
    return logits_of(model.module, hidden[:, :-1][scored]), scored


@torch.no_grad()
def replies_greedily(
    model: LanguageModel,
    prompt_embeds: Float[Tensor, "batch prompt dim"],
    prompt_mask: Bool[Tensor, "batch prompt"],
    reply: Reply,
) -> Bool[Tensor, " batch"]:
    """Whether greedy decoding of each prompt begins with exactly this reply."""
    best = reply_logits(model, prompt_embeds, prompt_mask, reply).argmax(-1)
    wrong = torch.zeros_like(reply.mask)
    wrong[reply.mask] = best != reply.ids[reply.mask]
    return ~wrong.any(1)


def decode_continued(
    model: LanguageModel,
    prompt_embeds: Float[Tensor, "batch prompt dim"],
    prompt_mask: Bool[Tensor, "batch prompt"],
    reply: Reply,
) -> Float[Tensor, "batch token dim"]:
    """Final hidden states of prompts with one reply each, its last token not fed."""
    embeds = torch.cat([prompt_embeds.to(weight_dtype(model.module)), model.embed(reply.fed.ids)], dim=1)
    mask = torch.cat([prompt_mask, reply.fed.mask], dim=1)
    return decode(model.module, embeds, mask, positions_of(mask))
