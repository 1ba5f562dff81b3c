"""Probe sampling (Zhao et al. 2024, arXiv 2403.01251, algorithm 1): a small draft model reads all candidates
of a GCG step, the model under attack only those that the draft finds promising.

How many those are depends on how well the two agree on a few candidates that both have read: agree they
perfectly, one is enough; not at all, `width / reduction`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from datamodules.fields import Count, Positive, checked
from lightning_modules.models.embeddings import embedding_weight
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig, load_model


class Scored(Protocol):
    """Candidates that the attacked model has read."""

    @property
    def scores(self) -> Float[Tensor, " chosen"]: ...

    def joined(self: Read, other: Read) -> Read: ...


Read = TypeVar("Read", bound=Scored)


@checked
@dataclass
class ProbeSampling:
    """The draft model of a GCG, and how far it is trusted."""

    draft: ModelConfig
    """The small model; it needs the vocabulary of the model under attack."""
    probe_fraction: Positive = 0.0625
    """Share of a step's candidates that both models read, to see how well they agree [1/16]."""
    reduction: Count = 8
    """R: the attacked model reads (1 - agreement) * width / R of the candidates, besides the probes [8]."""

    def __post_init__(self) -> None:
        if self.probe_fraction > 1:
            raise ValueError(
                f"probe.probe_fraction: expected a share of at most 1, got {self.probe_fraction}"
            )

    def model(self, attacked: LanguageModel) -> LanguageModel:
        """The draft on the attacked model's device, frozen. Raises: ValueError for another vocabulary."""
        draft = LanguageModel(self._loaded.to(attacked.device), chat=attacked.chat)
        own, other = (len(embedding_weight(model)) for model in (draft, attacked))
        if own != other:
            raise ValueError(
                f"probe.draft: expected the model's vocabulary of {other} tokens, got {own}; choose a draft "
                "with the same tokenizer"
            )
        return draft

    def read(
        self,
        scores: Float[Tensor, " candidate"],
        owners: Sequence[int],
        rngs: Sequence[torch.Generator],
        read: Callable[[Int[Tensor, " chosen"]], Read],
    ) -> Read:
        """Have the attacked model read the probes, then those favourites that the draft's agreement leaves.

        Args:
            scores: what the search minimises, by the draft.
            owners: the behaviour of each candidate.
            rngs: of each behaviour; they draw its probes.
            read: the attacked model's scores of some candidates.
        """
        whose = torch.tensor(owners)
        own = [(whose == row).nonzero().flatten() for row in dict.fromkeys(owners)]
        probes = [
            where[
                torch.randperm(len(where), generator=rngs[owners[int(where[0])]])[
                    : self.num_probes(len(where))
                ]
            ]
            for where in own
        ]
        seen = read(torch.cat(probes))
        favoured = []
        for where, probe, found in zip(own, probes, seen.scores.split([len(p) for p in probes]), strict=True):
            rest = where[~torch.isin(where, probe)]
            count = self.num_filtered(agreement(scores[probe], found), len(where))
            favoured.append(rest[scores[rest].argsort(stable=True)[:count]])
        chosen = torch.cat(favoured)
        return seen.joined(read(chosen)) if len(chosen) else seen

    @cached_property
    def _loaded(self) -> torch.nn.Module:
        return load_model(self.draft).eval().requires_grad_(False)

    def num_probes(self, width: int) -> int:
        """How many of `width` candidates both models read: at least two, or nothing could be compared."""
        return min(width, max(2, round(self.probe_fraction * width)))

    def num_filtered(self, agreement: float, width: int) -> int:
        """How many of the draft's favourites the model under attack reads, for an agreement in [0, 1]."""
        return min(width, max(1, round((1.0 - agreement) * width / self.reduction)))


def agreement(draft: Float[Tensor, " probe"], attacked: Float[Tensor, " probe"]) -> float:
    """(1 + Spearman's rank correlation) / 2 of the two models' losses; one half where a side is constant."""
    # A candidate that cannot be scored is the worst, for both.
    draft, attacked = (own.nan_to_num(nan=torch.inf) for own in (draft, attacked))
    if len(draft) < 2 or draft.unique().numel() == 1 or attacked.unique().numel() == 1:
        return 0.5
    return float(0.5 * (1.0 + spearmanr(draft.numpy(), attacked.numpy()).statistic))
