"""The input embedding of a model: its weight, every token's embedding as the decoder receives it, their mean
norm."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from peft.tuners.lora import Embedding as LoraEmbedding
from torch import Tensor, nn

from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.language_model import LanguageModel

CHUNK_ROWS = 32_768
"""Tokens embedded at once where all are."""

_norms: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Tensor]] = WeakKeyDictionary()


def embedding_weight(model: LanguageModel) -> Float[Tensor, "vocabulary dim"]:
    """The weight itself, without adapters and without what the module does beside looking it up."""
    return next(iter(_module(model).parameters()))


@torch.no_grad()
def embedding_table(model: LanguageModel) -> Float[Tensor, "vocabulary dim"]:
    """Embedding of every token as the decoder receives it; the weight itself where the module only looks it
    up."""
    module = _module(model)
    if type(module) is nn.Embedding:
        return module.weight
    return torch.cat([module(rows) for rows in _all_rows(model)])


def embedding_matrix(model: LanguageModel) -> Float[Tensor, "vocabulary dim"]:
    """Weight of the input embedding with its adapters' delta, differentiable in both."""
    module = _module(model)
    if not isinstance(module, LoraEmbedding):
        return embedding_weight(model)
    deltas = [module.get_delta_weight(name) for name in module.active_adapters]
    return torch.stack([module.get_base_layer().weight, *deltas]).sum(0)


@torch.no_grad()
def mean_embedding_norm(model: LanguageModel) -> Float[Tensor, ""]:
    """rho: the mean l2 norm over the vocabulary of the embedding the decoder receives, in fp32 or wider.

    Remembered until a weight changes: attacks ask for it at every call.
    """
    module = _module(model)
    versions = tuple(p._version for p in module.parameters())
    known = _norms.get(module)
    # A weight that is gathered in FSDP2's buffers keeps its version when it changes.
    known = known if model.sharded is None else None
    if known is None or known[0] != versions or known[1].device != model.device:
        wide = torch.promote_types(embedding_weight(model).dtype, torch.float32)
        norms = [module(rows).to(wide).norm(dim=-1) for rows in _all_rows(model)]
        known = _norms[module] = versions, torch.cat(norms).mean()
    return known[1]


def _module(model: LanguageModel) -> nn.Module:
    return causal_lm(model.module).get_input_embeddings()


def _all_rows(model: LanguageModel) -> tuple[Tensor, ...]:
    count = embedding_weight(model).shape[0]
    return torch.arange(count, device=model.device).split(CHUNK_ROWS)
