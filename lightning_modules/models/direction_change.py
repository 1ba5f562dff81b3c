"""How far training has moved the direction of refusal: turned, lengthened, or spread over more dimensions.

A layer's direction is the difference of the mean residual activations of harmful and of harmless requests
at the prompt's last token (Arditi et al. 2024, arXiv 2406.11717), of the same requests before and after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import scipy.stats
import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.models.hidden_states import conversation_states, num_layers
from lightning_modules.models.language_model import Encoded, LanguageModel
from lightning_modules.models.refusal_direction import parts


@dataclass(frozen=True)
class States:
    """Residual activations at the last token of the prompts, after every layer; in fp32."""

    harmful: Float[Tensor, "layer harmful dim"]
    harmless: Float[Tensor, "layer harmless dim"]


@dataclass(frozen=True)
class Change:
    """One layer's direction before training and after it, or the mean over layers."""

    cosine: float
    """Of the angle between the two; 1: not turned. Without the bias of finitely many requests (`changes`), so
    that an estimate may lie beyond 1."""
    low: float
    """Of a 95 % interval by a jackknife over requests, the same ones before and after."""
    high: float
    along: float
    """How far the two kinds of requests are apart along the old direction, as a share of what they were."""
    length: float
    """How far they are apart along the new one, as a share of what they were along the old one."""
    rank_before: float
    """Effective rank of the harmful requests' states around the mean harmless one: in how many dimensions
    they are apart from it."""
    rank: float
    """The same after training."""


@torch.no_grad()
def last_states(model: LanguageModel, harmful: Encoded, harmless: Encoded) -> States:
    """Of all requests, some at once."""
    layers = range(num_layers(model))

    def of(prompts: Encoded) -> Float[Tensor, "layer batch dim"]:
        found = []
        for part in parts(prompts):
            states = conversation_states(model, part.prompt_ids, part.prompt_mask, layers)
            # Left-padded: the last column is every prompt's last token.
            found.append(torch.stack([own[:, -1].float() for own in states]).cpu())
        return torch.cat(found, 1)

    return States(of(harmful), of(harmless))


def changes(before: States, after: States) -> list[Change]:
    """Of every layer, and at the end the mean of those that have a direction; NaN where one is no longer than
    its noise, or not finite.

    The mean of n states of D dimensions has noise of its own, which at D > n is no shorter than many a
    direction: it lengthens both directions and, since both are of the same requests, turns them towards one
    another. Inner products are therefore taken between different requests only (U-statistics, unbiased).

    Raises: ValueError with fewer than four requests of a kind.
    """
    counts = before.harmful.shape[1], before.harmless.shape[1]
    if min(counts) < 4:
        raise ValueError(
            f"refusal direction: expected at least 4 harmful and harmless requests, got {counts}"
        )
    found, replicates = [], []
    for layer in range(len(before.harmful)):
        pairs = ((before, before), (before, after), (after, after))
        old, both, new = (_inner(one, other, layer) for one, other in pairs)
        measurable = (old > 0) & (new > 0)  # else nothing but noise
        cosines = torch.where(measurable, both / (old * new).abs().sqrt(), math.nan)
        replicates.append(cosines)
        found.append(
            Change(
                *_jackknifed(cosines, counts),
                along=float(both[0] / old[0]) if old[0] > 0 else math.nan,
                length=float((new[0] / old[0]).sqrt()) if measurable[0] else math.nan,
                rank_before=effective_rank(before.harmful[layer] - before.harmless[layer].mean(0)),
                rank=effective_rank(after.harmful[layer] - after.harmless[layer].mean(0)),
            )
        )
    return [*found, _mean(found, torch.stack(replicates), counts)]


def effective_rank(rows: Float[Tensor, "row dim"]) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007): 1 where all rows are
    multiples of one, as many as there are dimensions where they lie in all of them alike."""
    if not rows.isfinite().all():
        return math.nan
    shares = torch.linalg.svdvals(rows.double())
    shares = shares[shares > 0] / shares.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def _inner(one: States, other: States, layer: int) -> Float[Tensor, " replicate"]:
    """Unbiased inner product of two directions: of all requests, then without each harmful and without each
    harmless one."""
    bad = one.harmful[layer].double(), other.harmful[layer].double()
    good = one.harmless[layer].double(), other.harmless[layer].double()
    among_bad, mean_bad = _without_each(*bad)
    among_good, mean_good = _without_each(*good)
    # Which requests are left: all; all but one of the harmful ones; all but one of the harmless ones.
    n, m = len(bad[0]), len(good[0])
    left_bad = torch.cat([torch.arange(n + 1), torch.zeros(m, dtype=torch.long)])
    left_good = torch.cat([torch.zeros(n + 1, dtype=torch.long), torch.arange(1, m + 1)])
    between = (mean_bad[0][left_bad] * mean_good[1][left_good]).sum(1)
    between += (mean_good[0][left_good] * mean_bad[1][left_bad]).sum(1)
    return among_bad[left_bad] + among_good[left_good] - between


def _without_each(
    one: Float[Tensor, "n dim"], other: Float[Tensor, "n dim"]
) -> tuple[Float[Tensor, " n+1"], tuple[Float[Tensor, "n+1 dim"], Float[Tensor, "n+1 dim"]]]:
    """Mean inner product of different rows, and both means: of all rows, then without each."""
    n = len(one)
    own = (one * other).sum(1)
    sums = [torch.cat([rows.sum(0, keepdim=True), rows.sum(0) - rows]) for rows in (one, other)]
    same = torch.cat([own.sum(0, keepdim=True), own.sum() - own])
    left = torch.tensor([n] + [n - 1] * n, dtype=one.dtype)
    among = ((sums[0] * sums[1]).sum(1) - same) / (left * (left - 1))
    first, second = (total / left[:, None] for total in sums)
    return among, (first, second)


def _jackknifed(
    replicates: Float[Tensor, " replicate"], counts: tuple[int, int]
) -> tuple[float, float, float]:
    """The estimate less its bias (a ratio of unbiased parts has some), and Student's interval, by a jackknife
    over both kinds of requests."""
    whole, *kinds = replicates.split([1, *counts])
    bias = sum((len(own) - 1) * (own.mean() - whole) for own in kinds)
    variance = sum((len(own) - 1) / len(own) * ((own - own.mean()) ** 2).sum() for own in kinds)
    half = float(scipy.stats.t.ppf(0.975, min(counts) - 1)) * math.sqrt(float(variance))
    value = float(whole - bias)
    return value, value - half, value + half


def _mean(
    found: Sequence[Change], replicates: Float[Tensor, "layer replicate"], counts: tuple[int, int]
) -> Change:
    """Over the layers that have a direction, both times."""
    measurable = replicates.isfinite().all(1)

    def of(name: str) -> float:
        kept = [getattr(own, name) for own, is_there in zip(found, measurable, strict=True) if is_there]
        return sum(kept) / len(kept) if kept else math.nan

    names = ("along", "length", "rank_before", "rank")
    return Change(*_jackknifed(replicates[measurable].mean(0), counts), **{name: of(name) for name in names})
