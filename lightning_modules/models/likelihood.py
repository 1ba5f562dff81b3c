"""Per-example likelihood terms from (B, R) token log-probabilities; every function returns (B,) in nats per
token."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_cross_entropy(log_probs: Tensor, mask: Tensor) -> Tensor:
    """CE(y | x) = -(1/|y|) sum_t log p_t, per example.

    Args:
        log_probs: (B, R) token log-probabilities.
        mask: (B, R) bool, True on reply tokens.
    """
    return -masked_mean(log_probs, mask)


def unlikelihood(log_probs: Tensor, mask: Tensor, floor: float = -5.0) -> Tensor:
    """-(1/|y|) sum_t log(1 - p_t): small where every token is unlikely already.

    A token with log p_t < floor counts as if log p_t = floor, with no gradient: the threshold of the CAT
    authors' code, made continuous there (their version jumps to zero below it).
    """
    # Near p = 1 the loss diverges; 1e-6 bounds it at 14 nats.
    clamped = log_probs.clamp(min=floor, max=-1e-6)
    return -masked_mean(torch.log(-torch.expm1(clamped)), mask)


def soft_cutoff(loss: Tensor, cutoff: float, slope: float = 1e-3) -> Tensor:
    """(1 - slope) * c + slope * L where L < c, else L: continuous at c, per example (arXiv 2405.15589,
    section 4)."""
    return torch.where(loss < cutoff, (1.0 - slope) * cutoff + slope * loss, loss)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean of (B, R) values over the True positions of a mask; 0 where there are none."""
    return (values * mask).sum(1) / mask.sum(1).clamp_min(1)


def mellowmax(losses: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """(B,) mellowmax of (B, T) token losses (Asadi and Littman 2017): between their mean (alpha -> 0) and
    maximum (alpha -> inf).

    mm = (1 / alpha) log( (1 / n) sum_t exp(alpha loss_t) )
    """
    scaled = (alpha * losses).masked_fill(~mask, -torch.inf)
    return (scaled.logsumexp(1) - mask.sum(1).to(losses.dtype).log()) / alpha
