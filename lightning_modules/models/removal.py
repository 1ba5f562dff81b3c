"""Directions that some tokens lose after some layers, in training: the model has to do without them.

    h - (r . h) r,   r of length 1,   at the positions that were drawn

`refusal_direction.ablated` takes one direction away everywhere, also between attention and MLP; this takes
one per layer, from layers' outputs alone, and keeps nothing that recomputation could miss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.language_model import LanguageModel


@dataclass(frozen=True)
class Removal:
    """What is taken from whom."""

    vectors: Mapping[int, Float[Tensor, " dim"]]
    """Decoder layer, from 0 -> the direction that its output loses; of any length above 0."""
    where: Mapping[int, Bool[Tensor, "batch position"]]
    """The same layers -> at which positions of each conversation, counted from its first token; beyond the
    last one nothing is removed."""

    def select(self, start: int, stop: int) -> Removal:
        """Of the examples from `start` to before `stop`."""
        return Removal(self.vectors, {layer: own[start:stop] for layer, own in self.where.items()})


@contextmanager
def removed(model: LanguageModel, removal: Removal | None) -> Iterator[None]:
    """The batch that the removal was made for is read without its directions while the context lasts; None
    changes nothing."""
    if removal is None:
        yield
        return
    handles = []
    layers = causal_lm(model.module).get_decoder().layers
    for number, where in removal.where.items():
        vector = removal.vectors[number]
        hook = _hook(vector / vector.norm(), where)
        handles.append(layers[number].register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(unit: Float[Tensor, " dim"], where: Bool[Tensor, "batch position"]) -> Any:
    def lose(module: object, inputs: object, told: Mapping[str, Any], output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        # Padding stands at position 0 as the first token does: what it holds, nobody reads.
        chosen = _at(where.to(states.device), told["position_ids"].expand(states.shape[:2]))
        lost = _Lose.apply(states, unit.to(states.device), chosen)  # type: ignore[no-untyped-call]
        return (lost, *output[1:]) if isinstance(output, tuple) else lost

    return lose


def _at(
    where: Bool[Tensor, "batch position"], positions: Int[Tensor, "batch token"]
) -> Bool[Tensor, "batch token"]:
    known = positions < where.shape[1]
    return where.gather(1, positions.clamp_max(where.shape[1] - 1)) & known


def projected(
    states: Float[Tensor, "batch token dim"], unit: Float[Tensor, " dim"], chosen: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token dim"]:
    """The states without the direction at the chosen tokens; in fp32 or wider, where rounding leaves less of
    it."""
    wide = states if states.dtype == torch.float64 else states.float()
    own = unit.to(wide)
    part = torch.where(chosen, wide @ own, 0.0)
    return (wide - part[..., None] * own).to(states.dtype)


class _Lose(torch.autograd.Function):
    """The projection, which is its own transpose. Direction and places are kept as attributes: where layers
    are recomputed in the backward pass, the hook is gone, and saved tensors would be counted."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, unit: Tensor, chosen: Tensor) -> Tensor:  # type: ignore[override]
        ctx.unit, ctx.chosen = unit, chosen
        return projected(states, unit, chosen)

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        unit, chosen = ctx.unit, ctx.chosen  # type: ignore[attr-defined]
        return projected(upstream, unit, chosen), None, None
