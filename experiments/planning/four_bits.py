"""A base in 4-bit NormalFloat as bitsandbytes and PEFT make it, for a model that holds nothing.

What it changes in a step: linear layers but the head take about half a byte a weight, compute in bf16 on a
copy of their weight that they make at each use, and return what they are given; PEFT puts all else into fp32,
so that the hidden states, and with them most of what a backward pass keeps, are twice as wide as on a bf16
base.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.low_rank import lengthen

BLOCK, SUPER_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one of their own (double quantisation)."""


def nf4_bytes(weights: int) -> int:
    """Half a byte each, a byte for every block's scale, four for every block of those; tables of a layer
    aside."""
    scales = -(-weights // BLOCK)
    return weights // 2 + scales + 4 * -(-scales // SUPER_BLOCK)


def as_nf4(model: nn.Module) -> int:
    """Let a model that holds nothing compute as if its base were in NF4. Returns: how many bytes less its
    weights take than the tensors that stand for them."""
    lengthen(model)  # PEFT's layers around a base in 4 bits stay as they are
    head, saved, quantised = causal_lm(model).get_output_embeddings(), 0, set()
    for name, part in model.named_modules():
        if type(part) is nn.Linear and part is not head and "lora_" not in name:
            weight = part.weight
            weight.data = weight.data.to(torch.bfloat16)
            part.forward = partial(_linear, part)  # type: ignore[method-assign]
            saved += 2 * weight.numel() - nf4_bytes(weight.numel())
            quantised.add(id(weight))
    for parameter in model.parameters():
        if id(parameter) not in quantised:
            parameter.data = parameter.data.float()
    return saved


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        half = x.to(torch.bfloat16)
        given: Tensor = _Dequantised.apply(half, layer.weight)  # type: ignore[no-untyped-call]
        return (given if layer.bias is None else given + layer.bias).to(x.dtype)


class _Dequantised(torch.autograd.Function):
    """A product with a copy of the weight, which nobody keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, torch.empty_like(weight))

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return upstream @ torch.empty_like(weight), None
