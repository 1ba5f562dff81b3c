"""Per-example likelihood terms from token log-probabilities, in nats per token; masks are True on reply
tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def mean_cross_entropy(
    log_probs: Float[Tensor, "batch reply"], mask: Bool[Tensor, "batch reply"]
) -> Float[Tensor, " batch"]:
    """CE(y | x) = -(1/|y|) sum_t log p_t."""
    return -masked_mean(log_probs, mask)


def unlikelihood(
    log_probs: Float[Tensor, "batch reply"], mask: Bool[Tensor, "batch reply"], floor: float = -5.0
) -> Float[Tensor, " batch"]:
    """-(1/|y|) sum_t log(1 - p_t): small where every token is unlikely already.

    A token with log p_t < floor counts as if log p_t = floor, with no gradient: the threshold of the CAT
    authors' code, made continuous there (their version jumps to zero below it).
    """
    # Near p = 1 the loss diverges; 1e-6 bounds it at 14 nats.
    clamped = log_probs.clamp(min=floor, max=-1e-6)
    return -masked_mean(torch.log(-torch.expm1(clamped)), mask)


def soft_cutoff(loss: Float[Tensor, " batch"], cutoff: float, slope: float = 1e-3) -> Float[Tensor, " batch"]:
    """(1 - slope) * c + slope * L where L < c, else L: continuous at c (arXiv 2405.15589, section 4)."""
    return torch.where(loss < cutoff, (1.0 - slope) * cutoff + slope * loss, loss)


def masked_mean(
    values: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, " batch"]:
    """Mean over the True positions of a mask; 0 where there are none."""
    return (values * mask).sum(1) / mask.sum(1).clamp_min(1)


def mellowmax(
    losses: Float[Tensor, "batch reply"], mask: Bool[Tensor, "batch reply"], alpha: float
) -> Float[Tensor, " batch"]:
    """Mellowmax of token losses (Asadi and Littman 2017): between their mean (alpha -> 0) and maximum
    (alpha -> inf).

    mm = (1 / alpha) log( (1 / n) sum_t exp(alpha loss_t) )
    """
    scaled = (alpha * losses).masked_fill(~mask, -torch.inf)
    return (scaled.logsumexp(1) - mask.sum(1).to(losses.dtype).log()) / alpha
