"""Reading and moving the outputs of decoder layers, counted from 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_modules.models.decoder import causal_lm, decode
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.logits import decode_continued
from lightning_modules.models.masks import positions_of
from lightning_modules.models.passes import count_backward
from lightning_modules.models.reply import Reply


def num_layers(model: LanguageModel) -> int:
    """How many decoder layers the model has."""
    return len(_layers(model))


def conversation_states(
    model: LanguageModel,
    input_ids: Int[Tensor, "batch token"],
    attention_mask: Bool[Tensor, "batch token"],
    layers: Sequence[int],
) -> list[Float[Tensor, "batch token dim"]]:
    """Output of each of the layers on whole conversations."""
    with _recorded(model, layers) as states:
        decode(model.module, model.embed(input_ids), attention_mask, positions_of(attention_mask))
    return _counted(states, layers)


def reply_states(
    model: LanguageModel,
    prompt_embeds: Float[Tensor, "batch prompt dim"],
    prompt_mask: Bool[Tensor, "batch prompt"],
    reply: Reply,
    layers: Sequence[int],
) -> list[Float[Tensor, "batch reply-1 dim"]]:
    """Output of each of the layers at a reply's tokens, but for the last, which is not fed."""
    with _recorded(model, layers) as states:
        decode_continued(model, prompt_embeds, prompt_mask, reply)
    return [whole[:, prompt_embeds.shape[1] :] for whole in _counted(states, layers)]


@contextmanager
def perturbed_layers(
    model: LanguageModel, deltas: Mapping[int, Float[Tensor, "batch prompt dim"]]
) -> Iterator[None]:
    """Add deltas[l] to the output of layer l at a prompt's positions, wherever a whole prompt passes.

    Steps of generation that feed single tokens pass unchanged: their prompt's perturbed states are in the
    cache.
    """

    def hook_of(delta: Tensor) -> Any:
        def hook(module: nn.Module, inputs: object, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            length = delta.shape[1]
            if hidden.shape[1] < length:
                return output
            moved = torch.cat([(hidden[:, :length] + delta).to(hidden.dtype), hidden[:, length:]], dim=1)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    with _hooked(model, {number: hook_of(delta) for number, delta in deltas.items()}):
        yield


@contextmanager
def _recorded(model: LanguageModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Layer -> (batch, token, dim) output of the last forward pass inside the context."""
    states: dict[int, Tensor] = {}

    def recorder(number: int) -> Any:
        def record(module: nn.Module, inputs: object, output: Any) -> None:
            states[number] = output[0] if isinstance(output, tuple) else output

        return record

    with _hooked(model, {number: recorder(number) for number in layers}):
        yield states


def _counted(states: Mapping[int, Tensor], layers: Sequence[int]) -> list[Tensor]:
    """The states in the order asked for. Their gradient enters at the deepest of them and never meets the
    final states, so that is where the backward pass is counted."""
    deepest = states[max(layers)]
    count_backward(deepest, len(deepest))
    return [states[layer] for layer in layers]


@contextmanager
def _hooked(model: LanguageModel, hooks: Mapping[int, Any]) -> Iterator[None]:
    # Not every decoder names its layers so, and most attacks hook none.
    handles = [_layers(model)[number].register_forward_hook(hook) for number, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: LanguageModel) -> nn.ModuleList:
    layers: nn.ModuleList = causal_lm(model.module).get_decoder().layers
    return layers
