"""What of a scoring depends on masks alone: positions, who attends to whom, which positions are scored.

Reading a mask makes the host wait for the GPU. An attack scores the same replies to the same prompts many
times: `known` reads all masks once, and nothing waits afterwards. The numbers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_masks_for_generate

from lightning_modules.models.decoder import text_config, weight_dtype
from lightning_modules.models.masks import branching_attention, restarting_positions


@dataclass(frozen=True)
class Layout:
    """Of prompts with one or more replies each, whose last tokens are not fed."""

    positions: Int[Tensor, "batch token"]
    attention: Any
    """What the decoder takes as its mask: of padding (batch, token), of whole rows, one per kind of layer, or
    None where every token sees all before it."""
    scored: tuple[Int[Tensor, " scored"], ...]
    """Numbers of the scored positions in each reply's flattened mask."""
    cache: Cache | None = None
    """For the decoder; keeps nothing."""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        prompt_mask: Bool[Tensor, "batch prompt"],
        masks: Sequence[Bool[Tensor, "batch reply"]],
    ) -> Layout:
        """For one scoring: the replies' masks are read, the whole rows' by the model itself."""
        fed = [mask[:, :-1] for mask in masks]
        lengths = [mask.shape[1] for mask in fed]
        positions = restarting_positions(prompt_mask, lengths)
        attention: Any = torch.cat([prompt_mask, *fed], dim=1)
        if len(masks) > 1:
            attention = branching_attention(
                text_config(module),
                attention,
                positions,
                prompt_mask.shape[1],
                lengths,
                weight_dtype(module),
            )
        scored = tuple(mask.flatten().nonzero().squeeze(1) for mask in masks)
        return cls(positions, attention, scored)

    @classmethod
    def known(
        cls,
        module: nn.Module,
        prompt_mask: Bool[Tensor, "batch prompt"],
        masks: Sequence[Bool[Tensor, "batch reply"]],
    ) -> Layout:
        """For many scorings, none of which reads a mask."""
        plain = cls.of(module, prompt_mask, masks)
        if len(masks) > 1:
            return plain
        # Only the shape, the type and the device of the embeddings are asked for.
        embeds = torch.empty(*plain.attention.shape, 1, dtype=weight_dtype(module), device=prompt_mask.device)
        made = create_masks_for_generate(
            text_config(module), embeds, plain.attention, None, position_ids=plain.positions
        )
        if isinstance(made, dict) and len(made) == 1:
            (made,) = made.values()
        return cls(plain.positions, made, plain.scored, Uncached() if made is None else None)


class Uncached(Cache):
    """A cache that keeps nothing. Without a mask and without a cache transformers compares the positions at
    every pass, to find rows that are packed into one, and waits for the answer."""

    def __init__(self) -> None:
        super().__init__(layers=[])

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
