"""LoRA weights merged or switched off for a while, without arithmetic on the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

# Layers whose base weight is the merged one just now: their switch is off, their adapters are not.
_MERGED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def merged_adapters(parts: Iterable[nn.Module], enabled: bool = True, rounded: bool = False) -> Iterator[int]:
    """Swap the base weight of each fp32 LoRA layer among a model's parts for the merged one; yields how many
    were merged.

    The original tensors are put back, not recomputed, so nothing drifts. Layers below fp32 stay unmerged,
    since rounding the sum to bf16 loses a part of the adapter's delta, unless `rounded` takes that for half
    the operations: the sum is then formed in fp32 and rounded once. A head whose weight is the embeddings'
    too stays unmerged: they would be read with its adapter in them.
    """
    parts = list(parts)
    tables = {id(part.weight) for part in parts if isinstance(part, nn.Embedding)}
    swapped: list[tuple[LoraLinear, Tensor]] = []
    try:
        if enabled:
            for layer in parts:
                if isinstance(layer, LoraLinear) and _can_merge(layer, rounded):
                    weight = layer.get_base_layer().weight
                    if id(weight) in tables:
                        continue
                    original = weight.data
                    with torch.no_grad():
                        merged = original.clone()
                        if original.dtype == torch.float32:
                            for name in layer.active_adapters:
                                merged += layer.get_delta_weight(name)
                        else:
                            deltas = [layer.get_delta_weight(name) for name in layer.active_adapters]
                            merged.copy_(torch.stack([original.float(), *deltas]).sum(0))
                    swapped.append((layer, original))
                    weight.data = merged
                    # The layer's own switch; PEFT's model-wide one would also touch requires_grad.
                    layer._disable_adapters = True
                    _MERGED.add(layer)
        yield len(swapped)
    finally:
        for layer, original in swapped:
            layer.get_base_layer().weight.data = original
            layer._disable_adapters = False
            _MERGED.discard(layer)


@contextmanager
def disabled_adapters(model: nn.Module) -> Iterator[None]:
    """The base model's own outputs while the context lasts; `requires_grad` stays as it is, which PEFT's own
    switch does not promise."""
    layers = [
        layer for layer in model.modules() if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters
    ]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def switches(model: nn.Module) -> list[tuple[bool, tuple[str, ...]]]:
    """Of each layer with adapters whether they are off, and which are active: what weights do not tell. Those
    that `merged_adapters` has merged are on."""
    return [
        (layer.disable_adapters and layer not in _MERGED, tuple(layer.active_adapters))
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
    ]


def _can_merge(layer: LoraLinear, rounded: bool) -> bool:
    weight = layer.get_base_layer().weight
    plain = not any(layer.use_dora.get(name, False) for name in layer.active_adapters)
    biased = any(layer.lora_bias.get(name, False) for name in layer.active_adapters)
    return (
        (weight.dtype == torch.float32 or (rounded and weight.dtype.is_floating_point))
        and plain
        and not biased
        and not layer.merged
        and not layer.disable_adapters
    )
