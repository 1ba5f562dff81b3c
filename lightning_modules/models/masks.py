"""Positions and attention masks: what of a row a token sees, and where it stands in its conversation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedConfig


def positions_of(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """Position ids that count a row's real tokens; padding stands at 0."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def numbers_of(mask: Bool[Tensor, "batch token"], count: int | None = None) -> Int[Tensor, " true"]:
    """Numbers of the True positions in the flattened mask; without their count the host waits for the GPU to
    learn it."""
    if count is None:
        return mask.flatten().nonzero().squeeze(1)
    return torch.nonzero_static(mask.flatten(), size=count).squeeze(1)


def restarting_positions(
    prompt_mask: Bool[Tensor, "batch prompt"], reply_lengths: Sequence[int]
) -> Int[Tensor, "batch token"]:
    """Position ids where the prompt counts from 0 and every reply continues from the prompt's end."""
    end = prompt_mask.long().sum(1, keepdim=True)
    replies = (end + torch.arange(length, device=prompt_mask.device) for length in reply_lengths)
    return torch.cat([positions_of(prompt_mask), *replies], dim=1)


def branching_attention(
    config: PreTrainedConfig,
    mask: Bool[Tensor, "batch token"],
    positions: Int[Tensor, "batch token"],
    prompt_length: int,
    reply_lengths: Sequence[int],
    dtype: torch.dtype,
) -> Tensor | dict[str, Tensor]:
    """Additive (batch, 1, token, token) masks in which the replies see the prompt and themselves but not each
    other; one per kind of layer where the architecture mixes them."""
    batch, total = mask.shape
    branch = torch.zeros(total, dtype=torch.long, device=mask.device)
    start = prompt_length
    for number, length in enumerate(reply_lengths, start=1):
        branch[start : start + length] = number
        start += length
    causal = torch.ones(total, total, dtype=torch.bool, device=mask.device).tril()
    visible = causal & ((branch[None, :] == 0) | (branch[None, :] == branch[:, None]))
    # Padding attends to itself so that no softmax row is empty.
    allowed = (visible & mask[:, None, :]) | torch.eye(total, dtype=torch.bool, device=mask.device)

    def additive(window: int | None) -> Tensor:
        seen = allowed
        if window is not None:
            # By position, not by column: a reply's window reaches into the prompt past its siblings.
            seen = seen & (positions[:, :, None] - positions[:, None, :] < window)
        floor = torch.finfo(dtype).min
        return torch.full((batch, 1, total, total), floor, dtype=dtype, device=mask.device).masked_fill(
            seen[:, None], 0.0
        )

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        return {kind: additive(window if kind == "sliding_attention" else None) for kind in kinds}
    sliding = kinds == {"sliding_attention"} or (not kinds and getattr(config, "use_sliding_window", True))
    return additive(window if sliding else None)
