"""How far training has moved the direction of refusal: turned, lengthened, or spread over more dimensions.

A layer's direction is the difference of the mean residual activations of harmful and of harmless requests
at the prompt's last token (Arditi et al. 2024, arXiv 2406.11717), of the same requests before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.models.hidden_states import conversation_states, num_layers
from lightning_modules.models.language_model import Encoded, LanguageModel
from lightning_modules.models.refusal_direction import parts

DRAWS = 500
"""Resamplings of the requests behind an interval."""
SPLITS = 20
"""Random halves of the requests."""


@dataclass(frozen=True)
class States:
    """Residual activations at the last token of the prompts, after every layer; in fp32."""

    harmful: Float[Tensor, "layer harmful dim"]
    harmless: Float[Tensor, "layer harmless dim"]

    def difference(self, layer: int) -> Float[Tensor, " dim"]:
        return self.harmful[layer].mean(0) - self.harmless[layer].mean(0)


@dataclass(frozen=True)
class Change:
    """One layer's direction before training and after it, or the mean over layers."""

    cosine: float
    """Of the angle between the two; 1: not turned."""
    low: float
    """Of a 95 % percentile bootstrap over requests, the same ones before and after."""
    high: float
    halves: float
    """The same cosine between the directions of two halves of the requests, both before training, mean over
    random halves: an angle up to this is what so few requests leave unknown."""
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


def changes(before: States, after: States, seed: int = 0) -> list[Change]:
    """Of every layer, and of their mean at the end.

    Raises: ValueError with fewer than four requests of a kind, of which no half has a mean worth the name.
    """
    counts = before.harmful.shape[1], before.harmless.shape[1]
    if min(counts) < 4:
        raise ValueError(
            f"refusal direction: expected at least 4 harmful and harmless requests, got {counts}"
        )
    rng = torch.Generator().manual_seed(seed)
    weights = [_resampled(n, rng) for n in counts]
    splits = [[torch.randperm(n, generator=rng) for n in counts] for _ in range(SPLITS)]
    found, drawn = [], []
    for layer in range(len(before.harmful)):
        old, new = before.difference(layer), after.difference(layer)
        resampled = [
            weights[0] @ own.harmful[layer] - weights[1] @ own.harmless[layer] for own in (before, after)
        ]
        cosines = _cosine(*resampled)
        drawn.append(cosines)
        found.append(
            Change(
                float(_cosine(old, new)),
                *_interval(cosines),
                halves=_halves(before, layer, splits),
                along=float(new @ old / (old @ old)),
                length=float(new.norm() / old.norm()),
                rank_before=effective_rank(before.harmful[layer] - before.harmless[layer].mean(0)),
                rank=effective_rank(after.harmful[layer] - after.harmless[layer].mean(0)),
            )
        )
    return [*found, _mean(found, torch.stack(drawn).mean(0))]


def effective_rank(rows: Float[Tensor, "row dim"]) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007): 1 where all rows are
    multiples of one, as many as there are dimensions where they lie in all of them alike."""
    shares = torch.linalg.svdvals(rows.double())
    shares = shares[shares > 0] / shares.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def _resampled(n: int, rng: torch.Generator) -> Float[Tensor, "draw n"]:
    """What every request weighs in a draw with replacement; a row's sum is 1."""
    drawn = torch.randint(0, n, (DRAWS, n), generator=rng)
    return torch.zeros(DRAWS, n).scatter_add(1, drawn, torch.full((DRAWS, n), 1.0 / n))


def _halves(own: States, layer: int, splits: Sequence[Sequence[Tensor]]) -> float:
    def half(split: Sequence[Tensor], start: int) -> Float[Tensor, " dim"]:
        kinds = zip((own.harmful[layer], own.harmless[layer]), split, strict=True)
        harmful, harmless = (states[order[start::2]].mean(0) for states, order in kinds)
        return harmful - harmless

    return sum(float(_cosine(half(split, 0), half(split, 1))) for split in splits) / len(splits)


def _cosine(one: Float[Tensor, "*draw dim"], other: Float[Tensor, "*draw dim"]) -> Float[Tensor, "*draw"]:
    return torch.nn.functional.cosine_similarity(one, other, dim=-1)


def _interval(values: Float[Tensor, " draw"]) -> tuple[float, float]:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _mean(found: Sequence[Change], cosines: Float[Tensor, " draw"]) -> Change:
    def of(name: str) -> float:
        return sum(getattr(own, name) for own in found) / len(found)

    names = ("halves", "along", "length", "rank_before", "rank")
    return Change(of("cosine"), *_interval(cosines), **{name: of(name) for name in names})
