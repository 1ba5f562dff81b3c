"""Scoring many prompts that begin alike: the beginning's keys and values are computed once."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from lightning_modules.models.decoder import decode, logits_of, scores_at, weight_dtype
from lightning_modules.models.language_model import LanguageModel, Reply, predictors, score
from lightning_modules.models.masks import positions_of
from lightning_modules.models.prefix_cache import PrefixCache


@torch.no_grad()
def prefix_cache(
    model: LanguageModel, ids: Int[Tensor, "batch prefix"], mask: Bool[Tensor, "batch prefix"]
) -> PrefixCache:
    """Compute the keys and values of left-padded prompt beginnings of at least one column."""
    cache = DynamicCache()
    decode(model.module, model.embed(ids), mask, positions_of(mask), cache)
    return PrefixCache(mask, tuple((layer.keys, layer.values) for layer in cache.layers))


@torch.no_grad()
def extend_cache(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    embeds: Float[Tensor, "row rest dim"],
    mask: Bool[Tensor, "row rest"],
) -> PrefixCache:
    """The beginnings `rows` of a cache, each continued by embeddings with their mask."""
    cache = prefix.rows(rows)
    _continue(model, prefix, rows, embeds, mask, cache)
    return cache.extended(torch.cat([prefix.mask[rows], mask], dim=1))


def continued_log_probs(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    embeds: Float[Tensor, "row rest dim"],
    mask: Bool[Tensor, "row rest"],
    reply: Reply,
) -> Float[Tensor, "row reply"]:
    """Log-probabilities of replies to prompts that continue cached beginnings.

    Args:
        model: the model that made the cache.
        prefix: the beginnings; they hold no gradient.
        rows: which beginning each row continues.
        embeds: the prompts' rest, with its mask, left-padded where a prompt is shorter.
        mask: False on padding.
        reply: one reply per row.

    Returns: fp32, 0 where the reply's mask is False.
    """
    hidden = _continued_by(model, prefix, rows, embeds, mask, reply)
    return score(model.module, hidden, reply, mask.shape[1], mask.shape[1], reply.scored)


@torch.no_grad()
def continued_scores(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    embeds: Float[Tensor, "row rest dim"],
    mask: Bool[Tensor, "row rest"],
    reply: Reply,
) -> tuple[Float[Tensor, "row reply"], Bool[Tensor, "row reply"]]:
    """As `continued_log_probs`, without a gradient, and whether greedy decoding would say each of the tokens
    after those before it (True outside the reply's mask)."""
    hidden = _continued_by(model, prefix, rows, embeds, mask, reply)
    states = predictors(hidden, reply, mask.shape[1], mask.shape[1])
    return scores_at(model.module, states, reply.ids, reply.scored)


@torch.no_grad()
def next_token_logits(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    ids: Int[Tensor, "row rest"],
    mask: Bool[Tensor, "row rest"],
) -> Float[Tensor, "row vocabulary"]:
    """fp32 logits of the token after each continued prompt; arguments as in `continued_log_probs`."""
    return logits_of(model.module, _continue(model, prefix, rows, model.embed(ids), mask)[:, -1])


def _continued_by(
    model: LanguageModel, prefix: PrefixCache, rows: Tensor, embeds: Tensor, mask: Tensor, reply: Reply
) -> Float[Tensor, "row rest dim"]:
    """Final hidden states of the prompts' rest and of what is fed of the reply."""
    whole = torch.cat([embeds.to(weight_dtype(model.module)), model.embed(reply.fed.ids)], dim=1)
    return _continue(model, prefix, rows, whole, torch.cat([mask, reply.fed.mask], dim=1))


def _continue(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    embeds: Float[Tensor, "row rest dim"],
    mask: Bool[Tensor, "row rest"],
    cache: Cache | None = None,
) -> Float[Tensor, "row rest dim"]:
    """Final hidden states of embeddings that continue cached beginnings."""
    whole = torch.cat([prefix.mask[rows], mask], dim=1)
    positions = positions_of(whole)[:, prefix.length :]
    return decode(model.module, embeds, whole, positions, cache or prefix.rows(rows))
