"""SmoothLLM (Robey et al. 2023, arXiv 2310.03684): replies to randomly perturbed copies of the request vote.

An optimised suffix is brittle; the request itself survives some changed characters. What of that is a
guarantee, and under which assumption, is in `certificates/k_instability.py`.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from datamodules.fields import Count, NonNegativeInt, Share, checked
from lightning_modules.attacks.verdicts import Verdict
from lightning_modules.defences.base import ROWS_AT_ONCE, Answer, rng_of, spent, without_documents
from lightning_modules.defences.voting import elected
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding, Request

ALPHABET = string.digits + string.ascii_letters + string.punctuation + " "
"""What characters are changed to: printable ASCII."""
Perturbation = Literal["swap", "insert", "patch"]


@checked
class SmoothLLM:
    """Majority over perturbed copies; answers with one of the replies that agree with it.

    Args:
        refusal: says of one reply whether it refuses.
        num_copies: copies of a request [N; 10 in the paper's figures].
        share: share of its characters that a copy has changed [q].
        perturbation: `swap` changes characters at random places, `insert` puts new ones after them, `patch`
            changes a run of them.
        seed: seed of the perturbations; null takes the run's.
    """

    name = "smooth_llm"

    def __init__(
        self,
        refusal: Verdict,
        num_copies: Count = 10,
        share: Share = 0.1,
        perturbation: Perturbation = "swap",
        seed: NonNegativeInt | None = None,
    ) -> None:
        self.refusal = refusal
        self.num_copies = num_copies
        self.share = share
        self.perturbation: Perturbation = perturbation
        self.seed = seed or 0

    def answers(
        self, model: LanguageModel, requests: Sequence[Request], decoding: Decoding, seed: int
    ) -> list[Answer]:
        """A reply that agrees with the majority; N times the cost."""
        rngs = [rng_of(self.seed, seed, request) for request in requests]
        copies = [
            self.perturbed(model, request, rng)
            for request, rng in zip(requests, rngs, strict=True)
            for _ in range(self.num_copies)
        ]
        replies = model.reply(copies, replace(decoding, max_rows=ROWS_AT_ONCE), seed)
        tokens = spent(model, copies, replies)
        found = []
        for i, (request, rng) in enumerate(zip(requests, rngs, strict=True)):
            own = slice(i * self.num_copies, (i + 1) * self.num_copies)
            reply, _ = elected(self.refusal, request.text, replies[own], rng)
            found.append(Answer(reply, self.num_copies, sum(tokens[own])))
        return found

    def seen_through(
        self, model: LanguageModel, requests: Sequence[Request], draws: int, seed: int
    ) -> list[list[Request]]:
        """What the model reads in the place of each request, drawn so many times: the defence's randomness as
        an attacker knows it, not the numbers that it will draw."""
        # The same draws for every candidate of a search: it compares suffixes, not luck.
        return [
            [
                self.perturbed(model, request, torch.Generator().manual_seed(seed * draws + number))
                for number in range(draws)
            ]
            for request in requests
        ]

    def excesses(
        self, model: LanguageModel, requests: Sequence[Request], replies: Sequence[str]
    ) -> list[float] | None:
        """None: nothing is stopped."""
        return None

    def perturbed(self, model: LanguageModel, request: Request, rng: torch.Generator) -> Request:
        """A copy with changed characters, as the template takes it. Raises: ValueError for a request with a
        document."""
        without_documents(type(self).__name__, [request])
        changed = perturb(request.text, self.share, self.perturbation, rng)
        # A change may spell a special token, or leave nothing but space.
        return replace(request, text=model.chat.neutralised(changed).strip() or request.text)


def perturb(text: str, share: float, kind: Perturbation, rng: torch.Generator) -> str:
    """The text with a share of its characters (at least one) changed to random ones of ALPHABET."""
    count = max(1, int(share * len(text)))
    new = [ALPHABET[i] for i in torch.randint(0, len(ALPHABET), (count,), generator=rng).tolist()]
    if kind == "patch":
        start = int(torch.randint(0, len(text) - count + 1, (1,), generator=rng))
        return text[:start] + "".join(new) + text[start + count :]
    places = torch.randperm(len(text), generator=rng)[:count].tolist()
    characters = list(text)
    for place, character in zip(places, new, strict=True):
        characters[place] = character if kind == "swap" else characters[place] + character
    return "".join(characters)
