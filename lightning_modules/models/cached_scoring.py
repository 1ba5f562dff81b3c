"""Scoring many prompts that begin alike: the beginning's keys and values are computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from lightning_modules.models.decoder import (
    decode,
    log_probs_at,
    logits_of,
    scores_at,
    text_config,
    weight_dtype,
)
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.masks import positions_of
from lightning_modules.models.prefix_cache import PrefixCache
from lightning_modules.models.reply import Reply
from lightning_modules.models.rotations import same_angles
from lightning_modules.models.shared_prefix import can_share, decode_shared
from lightning_modules.models.tail import last_positions


@torch.no_grad()
def prefix_cache(
    model: LanguageModel,
    ids: Int[Tensor, "batch prefix"],
    mask: Bool[Tensor, "batch prefix"],
    lengths: tuple[int, ...] = (),
) -> PrefixCache:
    """Compute the keys and values of left-padded prompt beginnings of at least one column, of so many tokens
    each where the host knows."""
    cache = DynamicCache()
    # Of the last layer keys and values are wanted, and nothing behind them.
    with last_positions(model.module, 1):
        decode(model.module, model.embed(ids), mask, positions_of(mask), cache)
    return PrefixCache(mask, tuple((layer.keys, layer.values) for layer in cache.layers), lengths)


@torch.no_grad()
def extend_cache(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    embeds: Float[Tensor, "row rest dim"],
    mask: Bool[Tensor, "row rest"],
    lengths: tuple[int, ...] = (),
) -> PrefixCache:
    """The beginnings `rows` of a cache, each continued by embeddings with their mask, to so many tokens where
    the host knows."""
    cache = prefix.rows(rows)
    with last_positions(model.module, 1):
        _continue(model, prefix, rows, embeds, mask, cache)
    return cache.extended(torch.cat([prefix.mask[rows], mask], dim=1), lengths)


def continued_log_probs(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    embeds: Float[Tensor, "row rest dim"],
    mask: Bool[Tensor, "row rest"],
    reply: Reply,
    names: Sequence[int] | None = None,
) -> Float[Tensor, "row reply"]:
    """Log-probabilities of replies to prompts that continue cached beginnings.

    Args:
        model: the model that made the cache.
        prefix: the beginnings; they hold no gradient.
        rows: which beginning each row continues.
        embeds: the prompts' rest, with its mask, left-padded where a prompt is shorter.
        mask: False on padding.
        reply: one reply per row.
        names: `rows` on the host, where the rest is not padded: without a gradient the beginnings are then
            not copied for each row.

    Returns: fp32, 0 where the reply's mask is False.
    """
    hidden = _continued_by(model, prefix, rows, embeds, mask, reply, names)
    return log_probs_at(model.module, hidden, reply.ids, reply.scored)


@torch.no_grad()
def continued_scores(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    embeds: Float[Tensor, "row rest dim"],
    mask: Bool[Tensor, "row rest"],
    reply: Reply,
    names: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "row reply"], Bool[Tensor, "row reply"]]:
    """As `continued_log_probs`, without a gradient, and whether greedy decoding would say each of the tokens
    after those before it (True outside the reply's mask)."""
    hidden = _continued_by(model, prefix, rows, embeds, mask, reply, names)
    return scores_at(model.module, hidden, reply.ids, reply.scored)


@torch.no_grad()
def next_token_logits(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    ids: Int[Tensor, "row rest"],
    mask: Bool[Tensor, "row rest"],
) -> Float[Tensor, "row vocabulary"]:
    """fp32 logits of the token after each continued prompt; arguments as in `continued_log_probs`."""
    with last_positions(model.module, 1):
        hidden = _continue(model, prefix, rows, model.embed(ids), mask)
    return logits_of(model.module, hidden[:, -1])


def _continued_by(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Tensor,
    embeds: Tensor,
    mask: Tensor,
    reply: Reply,
    names: Sequence[int] | None,
) -> Float[Tensor, "row reply dim"]:
    """Final hidden states that predict the reply's tokens."""
    whole = torch.cat([embeds.to(weight_dtype(model.module)), model.embed(reply.fed.ids)], dim=1)
    with last_positions(model.module, reply.ids.shape[1]):
        if names is not None and not embeds.requires_grad and can_share(model.module, prefix, whole.shape[1]):
            _check_angles(model, prefix, whole.shape[1])
            hidden = decode_shared(model.module, prefix, rows, names, whole)
        else:
            fed = torch.cat([mask, reply.fed.mask], dim=1)
            hidden = _continue(model, prefix, rows, whole, fed)
    return hidden[:, -reply.ids.shape[1] :]


def _check_angles(model: LanguageModel, prefix: PrefixCache, rest: int) -> None:
    if not same_angles(text_config(model.module), prefix.length, prefix.length + rest):
        raise ValueError(
            f"prompts of {prefix.length} tokens with {rest} more behind them: beyond a length that these "
            "pass this model turns its keys by the longest position, so that a beginning cannot be shared; "
            "shorten prompts or targets"
        )


def _continue(
    model: LanguageModel,
    prefix: PrefixCache,
    rows: Int[Tensor, " row"],
    embeds: Float[Tensor, "row rest dim"],
    mask: Bool[Tensor, "row rest"],
    cache: Cache | None = None,
) -> Float[Tensor, "row rest dim"]:
    """Final hidden states of embeddings that continue cached beginnings."""
    _check_angles(model, prefix, embeds.shape[1])
    whole = torch.cat([prefix.mask[rows], mask], dim=1)
    positions = positions_of(whole)[:, prefix.length :]
    return decode(model.module, embeds, whole, positions, cache or prefix.rows(rows))
