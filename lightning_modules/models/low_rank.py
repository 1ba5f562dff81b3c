"""LoRA layers on bf16 weights whose adapters are read in bf16, as mixed precision reads weights.

    y = x W^T + s (x A^T) B^T,    A: (r, in), B: (out, r), s = alpha / r
    dL/dx = g W + s (g B) A,   dL/dA = s (g B)^T x,   dL/dB = s g^T (x A^T),   g = dL/dy

PEFT's own layer casts x up to the adapters' fp32, multiplies and adds there, and casts the sum down: around a
bf16 weight these casts and fp32 products cost more than the weight does. Here A and B stay fp32 where they
learn, are rounded where they are read, and both sums accumulate in the product's output. In fp16, where small
gradients of A vanish without a scaled loss, PEFT's layers stay.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LowRankLinear(LoraLinear):
    """PEFT's layer with a shorter way through it; whatever is not plain LoRA goes PEFT's way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(*token, in) to (*token, out), in x's dtype; differentiable once."""
        name = self._plain_adapter(x) if not args and not kwargs else None
        if name is None:
            normal: Tensor = super().forward(x, *args, **kwargs)
            return normal
        base: Any = self.get_base_layer()
        dropout: Any = self.lora_dropout[name]
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = _LowRank.apply(  # type: ignore[no-untyped-call]
            rows,
            dropout(rows) if dropout.training and not isinstance(dropout, nn.Identity) else None,
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one active adapter where the layer is x W^T + s (x A^T) B^T and no more."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        name: str = active[0]
        base: Any = self.get_base_layer()
        plain = name not in self.lora_variant and not self.lora_bias[name]
        frozen = not any(parameter.requires_grad for parameter in base.parameters())
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return name if plain and frozen and dtype == x.dtype == base.weight.dtype else None


def shorten(model: nn.Module) -> nn.Module:
    """The model, in place: LoRA layers around plain linear ones in bf16 become `LowRankLinear`."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and type(layer) is LoraLinear:
            base = layer.get_base_layer()
            if type(base) is nn.Linear and base.weight.dtype == torch.bfloat16:
                layer.__class__ = LowRankLinear
    return model


def lengthen(model: nn.Module) -> nn.Module:
    """The model, in place, with PEFT's own layers again."""
    for layer in model.modules():
        if type(layer) is LowRankLinear:
            layer.__class__ = LoraLinear
    return model


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Float[Tensor, "token in"],
        dropped: Float[Tensor, "token in"] | None,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        a: Float[Tensor, "r in"],
        b: Float[Tensor, "out r"],
        scale: float,
    ) -> Float[Tensor, "token out"]:
        read = x if dropped is None else dropped
        down, up = a.to(x.dtype), b.to(x.dtype)
        inner = read @ down.T
        # In place on a tensor that nobody else has; torch's counter of operations knows no addmm_.
        y = nn.functional.linear(x, weight, bias)
        torch.addmm(y, inner, up.T, alpha=scale, out=y)
        learned = (read, inner) if any(ctx.needs_input_grad[4:6]) else ()
        ctx.save_for_backward(weight, down, up, *learned)
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, down, up, *learned = ctx.saved_tensors
        needs_x, needs_dropped = ctx.needs_input_grad[:2]
        through = g @ up
        of_x = of_dropped = of_a = of_b = None
        if needs_x:
            of_x = g @ weight
            if not needs_dropped:
                torch.addmm(of_x, through, down, alpha=ctx.scale, out=of_x)
        if needs_dropped:
            of_dropped = ctx.scale * through @ down
        if learned:
            read, inner = learned
            of_a = (through.T @ read).to(ctx.dtypes[0]) * ctx.scale
            of_b = (g.T @ inner).to(ctx.dtypes[1]) * ctx.scale
        return of_x, of_dropped, None, None, of_a, of_b, None
