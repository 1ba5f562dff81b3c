"""Erase-and-check (Kumar et al. 2023, arXiv 2309.02705): a request is flagged if a filter flags it, or any of
what is left of it when up to d tokens are erased.

The certificate: whatever is added within the mode (up to d tokens at the end; one or several blocks of up to
d tokens; d tokens anywhere), one of the erased requests is the request without it. A harmful request that the
filter flags by itself is therefore flagged under every such attack: the filter's clean accuracy is the
certificate. Tokens are those of the text as it is typed: what is added must not merge with the request's own,
as no suffix of this project's searches does; characters that do ("car?" and then "?? hi") are outside the
mode. Space around a text is nobody's: the filter sees texts without it. The randomised variant (`sample`)
looks at some of them only and certifies nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from datamodules.fields import Count, NonNegativeInt, Share, checked
from lightning_modules.attacks.verdicts import Verdict, verdicts
from lightning_modules.defences.base import ROWS_AT_ONCE, rng_of, spent, without_documents
from lightning_modules.defences.filtered import Check, Filter
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding, Request

Mode = Literal["suffix", "insertion", "infusion"]
MOST_CHECKS = 20_000
"""Erased requests of one request, above which its mode is refused: their number grows like a power of its
length, and of the infusion mode exponentially in d."""


@checked
class RefusalFilter:
    """Flags what the model behind it refuses.

    Args:
        refusal: says of one reply whether it refuses.
        max_new_tokens: so much of the reply is read.
    """

    name = "refusal_filter"

    def __init__(self, refusal: Verdict, max_new_tokens: Count = 16) -> None:
        self.refusal = refusal
        self.max_new_tokens = max_new_tokens

    def checks(self, model: LanguageModel, requests: Sequence[Request]) -> list[Check]:
        """1 for a refusal, -1 for none; one reply each, and one for requests that are alike.

        The filter asks for a reply of its own: what the attacker makes the answer begin with is not in it.
        """
        requests = [replace(own, prefill="") for own in requests]
        alike = list(dict.fromkeys(requests))
        replies = model.reply(alike, Decoding(self.max_new_tokens, max_rows=ROWS_AT_ONCE))
        refused = verdicts(self.refusal, [own.text for own in alike], replies, [""] * len(alike))
        tokens = spent(model, alike, replies)
        found = {
            request: Check(1.0 if flag else -1.0, 1, count)
            for request, flag, count in zip(alike, refused, tokens, strict=True)
        }
        return [found[request] for request in requests]


@checked
class EraseAndCheck:
    """A filter that also looks at what is left when tokens are erased.

    Args:
        filter: what looks at each of them.
        max_erase: d, in tokens of the user's text.
        mode: `suffix` erases the last 1 to d tokens; `insertion` blocks of 1 to d of them anywhere;
            `infusion` any 1 to d tokens.
        num_insertions: blocks that are erased at once [insertion].
        sample: look at this share of the erased requests, drawn at random; null looks at all, and only then
            is there a certificate.
        seed: seed of that draw; null takes the run's.
    """

    name = "erase_and_check"

    def __init__(
        self,
        filter: Filter,
        max_erase: Count = 20,
        mode: Mode = "suffix",
        num_insertions: Count = 1,
        sample: Share | None = None,
        seed: NonNegativeInt | None = None,
    ) -> None:
        if mode != "insertion" and num_insertions != 1:
            raise ValueError(
                f"EraseAndCheck.num_insertions: expected 1 in the mode {mode!r}, got {num_insertions}; set "
                "mode: insertion"
            )
        self.filter = filter
        self.max_erase = max_erase
        self.mode: Mode = mode
        self.num_insertions = num_insertions
        self.sample = sample
        self.seed = seed or 0

    @property
    def certifies(self) -> bool:
        """Whether a flag on the clean request is a guarantee under attack."""
        return self.sample is None

    def checks(self, model: LanguageModel, requests: Sequence[Request]) -> list[Check]:
        """The share of the erased requests that the filter flags; above 0 the request is flagged. It is so
        for certain, whatever is added within the mode, where the filter flags the request that nothing is
        erased of: a shorter one that is flagged may be out of reach once something is added.

        Raises: ValueError for a request with a document, or with more erased ones than can be looked at.
        """
        without_documents(type(self).__name__, requests)
        bare = [replace(request, text=request.text.strip() or request.text) for request in requests]
        whole = [[request, *self._erased(model, request)] for request in bare]
        found = iter(self.filter.checks(model, [own for family in whole for own in family]))
        joined = [_joined([next(found) for _ in family]) for family in whole]
        return joined if self.certifies else [replace(own, guaranteed=None) for own in joined]

    def _erased(self, model: LanguageModel, request: Request) -> list[Request]:
        tokens = request.tokens(model.chat)
        user = [i for i, own in enumerate(tokens.attackable("user")) if own]
        kept = num_erased(len(user), self.max_erase, self.mode, self.num_insertions)
        if kept > MOST_CHECKS:
            raise ValueError(
                f"EraseAndCheck.max_erase: expected at most {MOST_CHECKS} erased requests, got {kept} in the "
                f"mode {self.mode!r} for {len(user)} tokens; lower max_erase or num_insertions"
            )
        texts = [
            "".join(self._pieces(tokens.text, tokens.offsets, [user[i] for i in left]))
            for left in erased(len(user), self.max_erase, self.mode, self.num_insertions)
        ]
        if self.sample is not None:
            count = math.ceil(self.sample * len(texts))
            order = torch.randperm(len(texts), generator=rng_of(self.seed, 0, request))
            texts = [texts[i] for i in order[:count].tolist()]
        texts = [text.strip() for text in texts]
        return [replace(request, text=model.chat.neutralised(text)) for text in texts if text]

    @staticmethod
    def _pieces(text: str, offsets: Sequence[tuple[int, int]], kept: Sequence[int]) -> Iterator[str]:
        """The characters of the kept tokens; the space between two of them belongs to the later one."""
        for place in kept:
            before = offsets[place - 1][1] if place else 0
            yield text[min(before, offsets[place][0]) : offsets[place][1]]


def erased(length: int, d: int, mode: Mode, blocks: int = 1) -> Iterator[tuple[int, ...]]:
    """Places that are left, of every way to erase up to d of `length` tokens and leave at least one."""
    if mode == "suffix":
        for count in range(1, min(d, length - 1) + 1):
            yield tuple(range(length - count))
        return
    if mode == "infusion":
        for count in range(1, min(d, length - 1) + 1):
            yield from itertools.combinations(range(length), length - count)
        return
    seen = set()
    spans = [(i, j) for i in range(length) for j in range(i + 1, min(i + d, length) + 1)]
    for chosen in itertools.product(spans, repeat=blocks):
        gone = {place for start, end in chosen for place in range(start, end)}
        left = tuple(place for place in range(length) if place not in gone)
        if left and left not in seen:
            seen.add(left)
            yield left


def num_erased(length: int, d: int, mode: Mode, blocks: int = 1) -> int:
    """How many ways there are at most, without going through them."""
    if mode == "suffix":
        return max(0, min(d, length - 1))
    if mode == "infusion":
        return sum(math.comb(length, count) for count in range(1, min(d, length - 1) + 1))
    return sum(min(d, length - start) for start in range(length)) ** blocks


def _joined(family: Sequence[Check]) -> Check:
    """One word on a request by what was said of it, the first, and of what is left of it."""
    flagged = sum(check.flagged for check in family)
    return Check(
        flagged / len(family),
        sum(check.queries for check in family),
        sum(check.tokens for check in family),
        guaranteed=family[0].flagged,
    )
