"""Who attends to whom in rows that are scored, and where their tokens stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_masks_for_generate

from lightning_modules.models.decoder import text_config, weight_dtype
from lightning_modules.models.masks import branching_attention, restarting_positions


def branching_layout(
    module: nn.Module, prompt_mask: Bool[Tensor, "batch prompt"], fed: Sequence[Bool[Tensor, "batch reply"]]
) -> tuple[Int[Tensor, "batch token"], Any]:
    """Positions of prompts and of what is fed of one or more replies to each, and what the decoder takes as
    its mask: of padding, which the model itself reads, where there is one reply."""
    lengths = [mask.shape[1] for mask in fed]
    positions = restarting_positions(prompt_mask, lengths)
    mask = torch.cat([prompt_mask, *fed], dim=1)
    if len(fed) == 1:
        return positions, mask
    own = text_config(module), mask, positions, prompt_mask.shape[1], lengths, weight_dtype(module)
    return positions, branching_attention(*own)


def causal_attention(
    module: nn.Module, width: int, device: torch.device, cache: Uncached | None = None
) -> tuple[Any, Uncached]:
    """What a decoder takes as masks and cache for rows of this width that follow what a cache holds, by
    default nothing, and are padded at their end only: None where its kernel needs no mask."""
    cache = Uncached() if cache is None else cache
    # Only the shape, the type and the device of the embeddings are asked for.
    embeds = torch.empty(1, width, 1, dtype=weight_dtype(module), device=device)
    made = create_masks_for_generate(text_config(module), embeds, None, cache)
    if isinstance(made, dict) and len(made) == 1:
        (made,) = made.values()
    return made, cache


class Uncached(Cache):
    """A cache that keeps nothing. Without a mask and without a cache transformers compares the positions at
    every pass, to find rows that are packed into one, and waits for the answer."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def rows(self, index: Int[Tensor, " row"]) -> Uncached:
        """For some of the rows."""
        return self

    def check(self) -> None:
        """After a pass. Raises: RuntimeError where a layer did not ask for what is held for it."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0
