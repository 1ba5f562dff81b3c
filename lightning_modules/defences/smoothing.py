"""Embedding smoothing: replies under Gaussian noise on the user's embeddings vote.

The same noise that Cohen et al. 2019 (arXiv 1902.02918) certify with: `certificates/gaussian.py` says for
which perturbations the majority cannot change. A defence with few copies only votes; it certifies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.fields import Count, NonNegativeInt, Positive, checked
from lightning_modules.attacks.verdicts import Verdict
from lightning_modules.defences.base import Answer, Marked, marked, rng_of, spent
from lightning_modules.defences.voting import elected
from lightning_modules.models.embedding_noise import gaussian, noise_std
from lightning_modules.models.language_model import LanguageModel, encoded
from lightning_modules.models.requests import Decoding, Request


@checked
class EmbeddingSmoothing:
    """Majority over replies under noise; answers with one of those that agree with it.

    Args:
        refusal: says of one reply whether it refuses.
        sigma: standard deviation of the noise in every coordinate, in multiples of the mean embedding norm
            divided by the root of the embedding's width: at 1, a token's noise is as long as an embedding.
        num_copies: replies per request.
        seed: seed of the noise; null takes the run's.
    """

    name = "embedding_smoothing"

    def __init__(
        self,
        refusal: Verdict,
        sigma: Positive = 0.1,
        num_copies: Count = 10,
        seed: NonNegativeInt | None = None,
    ) -> None:
        self.refusal = refusal
        self.sigma = sigma
        self.num_copies = num_copies
        self.seed = seed or 0

    def answers(
        self, model: LanguageModel, requests: Sequence[Request], decoding: Decoding, seed: int
    ) -> list[Answer]:
        """A reply that agrees with the majority; as many replies as copies."""
        found: list[Answer] = []
        for start in range(0, len(requests), decoding.max_rows):
            part = requests[start : start + decoding.max_rows]
            found += self.embedded(model, marked(model, part, encoded(model, part)), decoding, seed)
        return found

    def embedded(self, model: LanguageModel, prompts: Marked, decoding: Decoding, seed: int) -> list[Answer]:
        """The same where an attack enters as embeddings: noise is put on top of it."""
        rngs = [rng_of(self.seed, seed, request) for request in prompts.requests]
        std = noise_std(model, self.sigma)
        drawn = [
            model.reply(Noisy(prompts, std, rngs), decoding, seed + copy) for copy in range(self.num_copies)
        ]
        found = []
        for request, replies, rng in zip(prompts.requests, zip(*drawn, strict=True), rngs, strict=True):
            reply, _ = elected(self.refusal, request.text, replies, rng)
            tokens = spent(model, [request] * len(replies), replies)
            found.append(Answer(reply, self.num_copies, sum(tokens)))
        return found

    def seen_through(
        self, model: LanguageModel, requests: Sequence[Request], draws: int, seed: int
    ) -> list[list[Request]]:
        """The request itself: a text does not show the noise. The attack that sees it is SmoothedPGD's."""
        return [[request] for request in requests]

    def excesses(
        self, model: LanguageModel, requests: Sequence[Request], replies: Sequence[str]
    ) -> list[float] | None:
        """None: nothing is stopped."""
        return None


@dataclass(frozen=True)
class Noisy:
    """Prompts with noise on the user's embeddings, drawn anew whenever they are applied."""

    prompts: Marked
    std: Float[Tensor, ""]
    rngs: Sequence[torch.Generator]

    @property
    def prompt_mask(self) -> Bool[Tensor, "batch prompt"]:
        return self.prompts.prompt_mask

    @property
    def forced(self) -> Sequence[Sequence[int]]:
        return self.prompts.forced

    @contextmanager
    def applied(self, model: LanguageModel) -> Iterator[Float[Tensor, "batch prompt dim"]]:
        """Embeddings of the prompts under noise."""
        with self.prompts.applied(model) as embeds:
            yield embeds + self.std * gaussian(embeds, self.prompts.attackable, self.rngs)
