"""Attacks that only put a request in other words: the request itself, prefilled replies, demonstrations,
templates, noise.

Each says which variants of a request there are; `RewriteAttack` tries them and keeps the best. Without a
judge that is the one under which the target is most likely; with a judge the variants are sent in turn until
a reply passes (black box: Best-of-N and template sets).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch

from datamodules.batch import AdversarialBatch
from datamodules.rows import HarmfulRow
from datamodules.sources.base import HarmfulSource
from lightning_modules.attacks.base import AttackedPrompt, draw_seed, example_rngs
from lightning_modules.attacks.text.noise import augment, misspell
from lightning_modules.attacks.text.search import TextSearch, Variant, Verdict
from lightning_modules.attacks.text.templates import fill, read_templates
from lightning_modules.models.language_model import LanguageModel


class RewriteAttack(ABC):
    """Tries the variants of each request.

    Args:
        judge: send the variants in turn until this judge is content with the reply; null picks by the
            target's loss alone.
        max_rows: variants per forward pass; halved and remembered when memory runs out.
        max_new_tokens: longest reply that the judge reads.
    """

    def __init__(self, judge: Verdict | None = None, max_rows: int = 64, max_new_tokens: int = 64) -> None:
        self.judge = judge
        self.max_rows = max_rows
        self.max_new_tokens = max_new_tokens

    @abstractmethod
    def variants(self, prompt: str, target: str, rng: random.Random) -> Sequence[Variant]:
        """Ways to put one request, in the order in which they are tried."""

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. Raises: ValueError without texts."""
        with model.frozen():
            search = TextSearch(model, batch, self.max_rows, self.max_new_tokens)
            seeds = [draw_seed(own) for own in example_rngs(batch, rng)]
            texts = zip(batch.prompts, batch.targets, seeds, strict=True)
            variants = [
                list(self.variants(prompt, target, random.Random(seed))) for prompt, target, seed in texts
            ]
            flat = [(row, number) for row, own in enumerate(variants) for number in range(len(own))]
            losses = search.losses([row for row, _ in flat], [variants[row][number] for row, number in flat])
            loss_of = dict(zip(flat, losses.tolist(), strict=True))
            for number in range(max(map(len, variants))):
                rows = [row for row, own in enumerate(variants) if number < len(own)]
                tried = [variants[row][number] for row in rows]
                search.record(rows, tried, torch.tensor([loss_of[row, number] for row in rows]))
            if self.judge is not None:
                self._send(search, batch, variants, loss_of, self.judge)
            return search.result()

    def _send(
        self,
        search: TextSearch,
        batch: AdversarialBatch,
        variants: list[list[Variant]],
        loss_of: dict[tuple[int, int], float],
        judge: Verdict,
    ) -> None:
        """Send each request's variants in turn until the judge is content; that variant becomes the
        result."""
        open_rows = list(range(len(variants)))
        for number in range(max(map(len, variants))):
            rows = [row for row in open_rows if number < len(variants[row])]
            tried = [variants[row][number] for row in rows]
            for row, variant, reply in zip(rows, tried, search.replies(rows, tried), strict=True):
                if reply and judge(batch.prompts[row], reply, batch.targets[row]):
                    search.keep(row, variant, loss_of[row, number])
                    open_rows.remove(row)


class DirectRequest(RewriteAttack):
    """The request as it is: what every attack must be compared with."""

    def variants(self, prompt: str, target: str, rng: random.Random) -> Sequence[Variant]:
        return [Variant(prompt)]


class Prefilling(RewriteAttack):
    """Forces the reply to begin with the target's first tokens, as an API that lets the caller start the
    reply would.

    Args:
        num_tokens: forced tokens.
        judge: send the variants in turn until this judge is content; null picks by the target's loss alone.
        max_rows: variants per forward pass; halved and remembered when memory runs out.
        max_new_tokens: longest reply that the judge reads.
    """

    def __init__(
        self, num_tokens: int = 5, judge: Verdict | None = None, max_rows: int = 64, max_new_tokens: int = 64
    ) -> None:
        super().__init__(judge, max_rows, max_new_tokens)
        if num_tokens < 1:
            raise ValueError(
                f"Prefilling.num_tokens: expected >= 1, got {num_tokens}; use DirectRequest for none"
            )
        self.num_tokens = num_tokens

    def variants(self, prompt: str, target: str, rng: random.Random) -> Sequence[Variant]:
        return [Variant(prompt, forced=self.num_tokens)]


class InContext(RewriteAttack):
    """Puts harmful requests with compliant replies before the request, as earlier turns (ICL; many-shot with
    a large count).

    Args:
        source: harmful requests to demonstrate with; the attacked request itself is never shown.
        num_shots: demonstrations.
        num_samples: different random choices of demonstrations to try.
        judge: send the variants in turn until this judge is content; null picks by the target's loss alone.
        max_rows: variants per forward pass; halved and remembered when memory runs out.
        max_new_tokens: longest reply that the judge reads.
    """

    def __init__(
        self,
        source: HarmfulSource,
        num_shots: int = 5,
        num_samples: int = 1,
        judge: Verdict | None = None,
        max_rows: int = 64,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__(judge, max_rows, max_new_tokens)
        if num_shots < 1 or num_samples < 1:
            raise ValueError(
                f"InContext.num_shots and num_samples: expected >= 1, got {num_shots} and {num_samples}"
            )
        self.source = source
        self.num_shots = num_shots
        self.num_samples = num_samples
        self._turns: list[tuple[str, str]] | None = None

    def variants(self, prompt: str, target: str, rng: random.Random) -> Sequence[Variant]:
        if self._turns is None:
            self._turns = [
                (row.prompt, row.target) for row in self.source.rows() if isinstance(row, HarmfulRow)
            ]
        others = [turn for turn in self._turns if turn[0] != prompt]
        if len(others) < self.num_shots:
            raise ValueError(
                f"InContext.num_shots: expected at most the source's {len(others)} other requests, "
                f"got {self.num_shots}"
            )
        return [Variant(prompt, tuple(rng.sample(others, self.num_shots))) for _ in range(self.num_samples)]


class Templates(RewriteAttack):
    """Wraps the request in jailbreak templates: role play, prompt injection, encodings, or a published set.

    Args:
        templates: name of a shipped set (`role_play`, `prompt_injection`, `encodings`, `all`), or a csv
            (column `text`), json or text file. A template marks the request's place by {prompt}, [INSERT
            PROMPT HERE] or [REPLACE]; without a mark it goes last.
        limit: use only the first so many templates; null for all.
        judge: send the variants in turn until this judge is content; null picks by the target's loss alone.
        max_rows: variants per forward pass; halved and remembered when memory runs out.
        max_new_tokens: longest reply that the judge reads.
    """

    def __init__(
        self,
        templates: str = "all",
        limit: int | None = None,
        judge: Verdict | None = None,
        max_rows: int = 64,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__(judge, max_rows, max_new_tokens)
        if limit is not None and limit < 1:
            raise ValueError(f"Templates.limit: expected >= 1 or null, got {limit}")
        self.templates = templates
        self.limit = limit
        self._texts: list[str] | None = None

    def variants(self, prompt: str, target: str, rng: random.Random) -> Sequence[Variant]:
        if self._texts is None:
            self._texts = read_templates(self.templates)[: self.limit]
        return [Variant(fill(template, prompt, target)) for template in self._texts]


class BestOfN(RewriteAttack):
    """Best-of-N jailbreaking: random capitalisation, scrambling and character noise, many times (Hughes et
    al. 2024, arXiv 2412.03556).

    Args:
        num_samples: augmented prompts per request.
        sigma: strength of the augmentation.
        judge: send the prompts in turn until this judge is content, as the published attack does; null picks
            by the target's loss.
        max_rows: variants per forward pass; halved and remembered when memory runs out.
        max_new_tokens: longest reply that the judge reads.
    """

    def __init__(
        self,
        num_samples: int = 1000,
        sigma: float = 0.4,
        judge: Verdict | None = None,
        max_rows: int = 64,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__(judge, max_rows, max_new_tokens)
        if num_samples < 1 or not 0 < sigma <= 1:
            raise ValueError(
                f"BestOfN.num_samples and sigma: expected >= 1 and within (0, 1], got {num_samples} "
                f"and {sigma}"
            )
        self.num_samples = num_samples
        self.sigma = sigma

    def variants(self, prompt: str, target: str, rng: random.Random) -> Sequence[Variant]:
        return [Variant(augment(prompt, self.sigma, rng)) for _ in range(self.num_samples)]


class Noise(RewriteAttack):
    """Typing errors at a given rate: the robustness of refusals to honest noise rather than to an adversary.

    Args:
        level: `character` swaps, drops, doubles and replaces letters; `word` drops, doubles and swaps words.
        rate: share of characters or words that are changed.
        num_samples: noisy prompts per request.
        judge: send the variants in turn until this judge is content; null picks by the target's loss alone.
        max_rows: variants per forward pass; halved and remembered when memory runs out.
        max_new_tokens: longest reply that the judge reads.
    """

    def __init__(
        self,
        level: Literal["character", "word"] = "character",
        rate: float = 0.1,
        num_samples: int = 1,
        judge: Verdict | None = None,
        max_rows: int = 64,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__(judge, max_rows, max_new_tokens)
        if not 0 < rate <= 1 or num_samples < 1:
            raise ValueError(
                f"Noise.rate and num_samples: expected within (0, 1] and >= 1, got {rate} and {num_samples}"
            )
        self.level = level
        self.rate = rate
        self.num_samples = num_samples

    def variants(self, prompt: str, target: str, rng: random.Random) -> Sequence[Variant]:
        return [Variant(misspell(prompt, self.level, self.rate, rng)) for _ in range(self.num_samples)]
