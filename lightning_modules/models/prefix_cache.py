"""Keys and values of a prompt's fixed beginning, computed once and shared by every candidate that continues
it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class PrefixCache:
    """The computed beginnings of prompts, left-padded like a prompt; `layers` holds keys and values, and
    `lengths` the tokens of each where the host knows them."""

    mask: Bool[Tensor, "batch prefix"]
    layers: tuple[
        tuple[Float[Tensor, "batch head prefix head_dim"], Float[Tensor, "batch head prefix head_dim"]], ...
    ]
    lengths: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def head(self, length: int) -> PrefixCache:
        """The beginnings' first `length` columns (views)."""
        layers = ((keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers)
        lengths = tuple(max(0, own - self.length + length) for own in self.lengths)
        return PrefixCache(self.mask[:, :length], tuple(layers), lengths)

    def rows(self, index: Int[Tensor, " row"]) -> Continuation:
        """A cache for one forward pass, row n beginning like prompt index[n]; this object stays unchanged."""
        return Continuation(self, index)


class Continuation(Cache):
    """What a model reads the beginnings from; afterwards it also knows the whole prompts' keys and values."""

    def __init__(self, prefix: PrefixCache, index: Int[Tensor, " row"]) -> None:
        self.shared = [_PrefixLayer(keys, values, index) for keys, values in prefix.layers]
        super().__init__(layers=list(self.shared))

    def extended(self, mask: Bool[Tensor, "row whole"], lengths: tuple[int, ...] = ()) -> PrefixCache:
        """The rows with what the model added to them; `mask` and `lengths` are those of the whole."""
        return PrefixCache(mask, tuple(layer.whole for layer in self.shared), lengths)


class _PrefixLayer(DynamicLayer):
    """One layer's shared keys and values."""

    whole: tuple[Tensor, Tensor]

    def __init__(self, keys: Tensor, values: Tensor, index: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.index = keys, values, index
        self.is_initialized = True
        self.dtype, self.device = keys.dtype, keys.device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.whole = (
            torch.cat([self.keys[self.index], key_states], dim=-2),
            torch.cat([self.values[self.index], value_states], dim=-2),
        )
        return self.whole
