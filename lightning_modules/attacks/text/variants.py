"""Ways to put a request: each object here writes the variants of one and knows nothing of how they are
tried.

A set of variants is called with the request, its target and an rng of the example's own, so that an
example's variants do not depend on its batch-mates.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from datamodules.fields import Count, Share
from datamodules.rows import HarmfulRow
from datamodules.sources.base import HarmfulSource
from datamodules.text.chat_format import Turn
from lightning_modules.attacks.text.noise import augment, misspell
from lightning_modules.attacks.text.templates import fill, read_templates


@dataclass(frozen=True)
class Variant:
    """One way to put a request: the user's text, earlier turns, and how many tokens of the target the reply
    is forced to begin with."""

    text: str
    history: tuple[Turn, ...] = ()
    forced: int = 0


Variants = Callable[[str, str, random.Random], Sequence[Variant]]
"""(request, target, rng) -> ways to put the request, in the order in which they are tried."""


@dataclass
class AsItIs:
    """The request alone."""

    def __call__(self, prompt: str, target: str, rng: random.Random) -> list[Variant]:
        return [Variant(prompt)]


@dataclass
class Prefilled:
    """The reply is forced to begin with the target's first `num_tokens` tokens."""

    num_tokens: Count

    def __call__(self, prompt: str, target: str, rng: random.Random) -> list[Variant]:
        return [Variant(prompt, forced=self.num_tokens)]


@dataclass
class Demonstrated:
    """Other requests of a source with their compliant replies stand before the request, as earlier turns."""

    source: HarmfulSource
    num_shots: Count
    num_samples: Count
    _turns: list[Turn] | None = field(default=None, init=False, repr=False)

    def __call__(self, prompt: str, target: str, rng: random.Random) -> list[Variant]:
        """Raises: ValueError where the source is too small."""
        if self._turns is None:
            rows = (row for row in self.source.rows() if isinstance(row, HarmfulRow))
            self._turns = [(row.prompt, row.target) for row in rows]
        others = [turn for turn in self._turns if turn[0] != prompt]
        if len(others) < self.num_shots:
            raise ValueError(
                f"InContext.num_shots: expected at most the source's {len(others)} other requests, "
                f"got {self.num_shots}"
            )
        return [Variant(prompt, tuple(rng.sample(others, self.num_shots))) for _ in range(self.num_samples)]


@dataclass
class Wrapped:
    """The request inside each of a set's templates."""

    templates: str
    limit: Count | None
    _texts: list[str] | None = field(default=None, init=False, repr=False)

    def __call__(self, prompt: str, target: str, rng: random.Random) -> list[Variant]:
        """Raises: ValueError for an unknown set."""
        if self._texts is None:
            self._texts = read_templates(self.templates)[: self.limit]
        return [Variant(fill(template, prompt, target)) for template in self._texts]


@dataclass
class Augmented:
    """Best-of-N's random capitalisation, scrambling and character noise."""

    num_samples: Count
    sigma: Share

    def __call__(self, prompt: str, target: str, rng: random.Random) -> list[Variant]:
        return [Variant(augment(prompt, self.sigma, rng)) for _ in range(self.num_samples)]


@dataclass
class Misspelt:
    """Typing errors at a given rate."""

    level: Literal["character", "word"]
    rate: Share
    num_samples: Count

    def __call__(self, prompt: str, target: str, rng: random.Random) -> list[Variant]:
        return [Variant(misspell(prompt, self.level, self.rate, rng)) for _ in range(self.num_samples)]
