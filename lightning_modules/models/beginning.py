"""The beginning of rows, where it stays the same: computed once.

What an attack may not touch before its first position (a template, a system message, the instruction before a
document) has the same keys and values whatever it does behind. They carry no gradient to it either. And what
all conversations of a batch begin with has the same in all of them; to what learns in it, their gradients add
up.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from lightning_modules.models.decoder import hidden_states, text_config
from lightning_modules.models.layout import Uncached, causal_attention
from lightning_modules.models.rotations import same_angles
from lightning_modules.models.tail import last_positions

Layer = tuple[Float[Tensor, "row head place dim"], Float[Tensor, "row head place dim"]]


class Beginning(Uncached):
    """What the decoder takes for a cache: keys and values of the rows' first `length` places, to which it
    adds nothing. A single row of them is every row's."""

    def __init__(self, layers: tuple[Layer, ...], length: int) -> None:
        super().__init__()
        self._layers, self.length = layers, length
        self._asked: set[int] = set()

    @classmethod
    def computed(cls, module: nn.Module, embeds: Float[Tensor, "row place dim"], width: int) -> Self | None:
        """Of rows of `width` places in all, without padding; None where a decoder keeps anything else than
        keys and values of every place, or where those depend on how long the whole is. No pass is counted:
        each later one counts as a whole."""
        config = text_config(module)
        if not same_angles(config, embeds.shape[1], width) or getattr(config, "alibi", False):
            return None
        length, cache = embeds.shape[1], DynamicCache()
        attention, _ = causal_attention(module, length, embeds.device)
        places = torch.arange(length, device=embeds.device)[None]
        with last_positions(module, 1):
            hidden_states(module, embeds, attention, places, cache)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        whole = all(keys is not None and keys.shape[-2] == length for keys, _ in layers)
        return cls(layers, length) if layers and whole else None

    def rows(self, index: Int[Tensor, " row"]) -> Beginning:
        """Of some of the rows."""
        return Beginning(tuple((keys[index], values[index]) for keys, values in self._layers), self.length)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._asked.add(layer_idx)
        own = zip(self._layers[layer_idx], (key_states, value_states), strict=True)
        keys, values = (torch.cat([x.expand(len(y), -1, -1, -1), y], dim=-2) for x, y in own)
        return keys, values

    def check(self) -> None:
        """Raises: RuntimeError where a layer read the rows without their beginning."""
        asked, self._asked = self._asked, set()
        if len(asked) != len(self._layers):
            raise RuntimeError(f"{len(asked)} of {len(self._layers)} layers asked for their beginnings")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0
