"""Gaussian noise on embeddings, in the unit of smoothing, of its certificates and of training under noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_modules.models.embeddings import mean_embedding_norm
from lightning_modules.models.language_model import LanguageModel


def noise_std(model: LanguageModel, sigma: float) -> Float[Tensor, ""]:
    """The absolute standard deviation in every coordinate: sigma * rho / sqrt(D)."""
    width = model.embed(torch.zeros(1, 1, dtype=torch.long, device=model.device)).shape[-1]
    return sigma * mean_embedding_norm(model) / width**0.5


def gaussian(
    like: Float[Tensor, "batch prompt dim"],
    where: Bool[Tensor, "batch prompt"],
    rngs: Sequence[torch.Generator],
) -> Float[Tensor, "batch prompt dim"]:
    """Standard normal numbers at the True positions, 0 elsewhere; a row's own rng draws a row's."""
    noise = torch.zeros(like.shape)
    for row, rng in enumerate(rngs):
        own = where[row].cpu()
        noise[row, own] = torch.randn(int(own.sum()), like.shape[-1], generator=rng)
    return noise.to(like)
