"""The last decoder layer where only some of its positions are read: beyond its attention it works on those
alone.

Its keys and values are those of all positions; its feed-forward part, four fifths of its work in a 7B model,
and the final norm are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.known import is_copy_of, says

_KNOWN = says(LlamaDecoderLayer.forward)


@contextmanager
def last_positions(module: nn.Module, count: int) -> Iterator[bool]:
    """While the context lasts, `decode` gives the states of the last so many positions only. Yields whether
    it does: a last layer that is none of the known kind, or whose output somebody waits for, is left
    alone."""
    with _read(module, lambda states: states[:, -count:]) as done:
        yield done


@contextmanager
def positions_read(module: nn.Module, where: Int[Tensor, " read"]) -> Iterator[bool]:
    """The same for positions by their numbers in the flattened batch: states are then (1, read, dim), since
    mixtures of experts ask for three dimensions."""
    with _read(module, lambda states: states.flatten(0, 1).index_select(0, where)[None]) as done:
        yield done


@contextmanager
def _read(module: nn.Module, select: Callable[[Tensor], Tensor]) -> Iterator[bool]:
    layers: Any = getattr(causal_lm(module).get_decoder(), "layers", None)
    if not layers or layers[-1]._forward_hooks or not is_copy_of(layers[-1], _KNOWN):
        yield False
        return
    layers[-1].forward = partial(_forward, layers[-1], select)
    try:
        yield True
    finally:
        del layers[-1].forward


def _forward(
    layer: Any,
    select: Callable[[Tensor], Tensor],
    hidden_states: Float[Tensor, "batch token dim"],
    **given: Any,
) -> Float[Tensor, "*read dim"]:
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **given)
    read = select(hidden_states) + select(attended)
    whole: Tensor = read + layer.mlp(layer.post_attention_layernorm(read))
    return whole
