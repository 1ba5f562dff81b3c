"""Root-mean-square norms with a shorter backward pass, for models whose weights do not learn.

    y = w * n,   n = x r,   r = (mean(x^2) + eps)^(-1/2)
    dL/dx = r (g - n mean(g n)),   g = w dL/dy

The forward pass is that of transformers to the bit; differentiated by hand, the backward pass takes 7
operations instead of about 16, of which an attack on a model of 32 layers executes 65 per iteration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_modules.models.known import is_copy_of, says

_KNOWN = says(LlamaRMSNorm.forward)


@contextmanager
def short_norms(parts: Iterable[nn.Module]) -> Iterator[None]:
    """The norms among a model's parts differentiate their input alone, while the context lasts."""
    norms: list[Any] = [part for part in parts if _is_known(part)]
    for norm in norms:
        norm.forward = partial(rms_norm, weight=norm.weight, eps=norm.variance_epsilon)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def rms_norm(x: Float[Tensor, "*token dim"], weight: Tensor, eps: float) -> Float[Tensor, "*token dim"]:
    """The norm of x, differentiable once and in x alone."""
    normed: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


def _is_known(part: nn.Module) -> bool:
    return hasattr(part, "variance_epsilon") and is_copy_of(part, _KNOWN)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        normed = wide * scale
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(normed, scale, weight)
            ctx.dtype = x.dtype
        return weight * normed.to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        normed, scale, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = (upstream * weight).to(torch.float32)
        along = (gradient * normed).mean(-1, keepdim=True)
        own = torch.addcmul(gradient, normed, along, value=-1.0) * scale
        return own.to(ctx.dtype), None, None  # type: ignore[attr-defined]
