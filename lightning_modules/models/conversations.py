"""Whole conversations, scored: what all of a batch begin with is computed once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_modules.models.beginning import Beginning
from lightning_modules.models.decoder import causal_lm, decode, log_probs_at, text_config
from lightning_modules.models.layout import causal_attention
from lightning_modules.models.masks import numbers_of, positions_of

WORTH = 0.25
"""Share of a batch's places that a common beginning must save: it costs a pass of its own, with as many
kernels as another."""


def label_log_probs(
    module: nn.Module,
    embeds: Float[Tensor, "batch token dim"],
    attention_mask: Bool[Tensor, "batch token"],
    labels: Int[Tensor, "batch token"],
    num_scored: int | None,
    common: int,
) -> tuple[Float[Tensor, "batch token-1"], Bool[Tensor, "batch token-1"]]:
    """As `LanguageModel.labelled_log_probs`, from embeddings."""
    hidden, first = decode_whole(module, embeds, attention_mask, common)
    targets, scored = labels[:, 1:], labels[:, 1:] != -100
    # The last position predicts nothing: as wide as the states, which are then not copied to be cut.
    positions = numbers_of(pad(scored[:, first:], (0, 1)), num_scored)
    log_probs = log_probs_at(module, hidden, pad(targets[:, first:], (0, 1)), positions)
    return pad(log_probs[:, :-1], (first, 0)), scored


def decode_whole(
    module: nn.Module,
    embeds: Float[Tensor, "batch place dim"],
    attention_mask: Bool[Tensor, "batch place"],
    common: int = 0,
) -> tuple[Float[Tensor, "batch rest dim"], int]:
    """States of right-padded rows, from some first place on, and that place: no token looks at the padding
    behind it, so that no mask is needed, and none is read.

    Args:
        module: the model.
        embeds: inputs as the decoder receives them.
        attention_mask: False on padding.
        common: so many first places are the same in all rows and need no states. They are left out where that
            is worth it, and where no dropout draws for each row; gradients are those of the whole rows.
    """
    rows, width = embeds.shape[:2]
    decoder: Any = causal_lm(module).get_decoder()
    if getattr(decoder, "gradient_checkpointing", False) and decoder.training:
        # Checkpointed layers take no cache, without which transformers looks for packed rows, or at the mask.
        return decode(module, embeds, attention_mask, positions_of(attention_mask)), 0
    begun = None
    if (rows - 1) * common >= WORTH * rows * width and not _drops(module):
        begun = Beginning.computed(module, embeds[:1, :common], width)
    first = 0 if begun is None else common
    attention, cache = causal_attention(module, width - first, embeds.device, begun)
    positions = torch.arange(first, width, device=embeds.device)[None]
    hidden = decode(module, embeds[:, first:], attention, positions, cache)
    cache.check()
    return hidden, first


def _drops(module: nn.Module) -> bool:
    """Whether dropout, or a router's noise, may be at work: rows that share a beginning would share what is
    drawn there."""
    # Some decoders draw by functions, at rates that only the configuration tells.
    rates = [value for name, value in vars(text_config(module)).items() if "drop" in name or "jitter" in name]
    configured = any(isinstance(rate, float) and rate > 0 for rate in rates)
    return (module.training and configured) or any(
        isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in module.modules()
    )
