"""The last decoder layer where only a row's end is read: beyond its attention it works on that end alone.

Its keys and values are those of all positions; its feed-forward part, four fifths of its work in a 7B model,
and the final norm are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
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
    layers: Any = getattr(causal_lm(module).get_decoder(), "layers", None)
    if not layers or layers[-1]._forward_hooks or not is_copy_of(layers[-1], _KNOWN):
        yield False
        return
    layers[-1].forward = partial(_forward, layers[-1], count)
    try:
        yield True
    finally:
        del layers[-1].forward


def _forward(
    layer: Any, count: int, hidden_states: Float[Tensor, "batch token dim"], **given: Any
) -> Float[Tensor, "batch end dim"]:
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **given)
    end = hidden_states[:, -count:] + attended[:, -count:]
    whole: Tensor = end + layer.mlp(layer.post_attention_layernorm(end))
    return whole
