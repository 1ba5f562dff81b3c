"""Attacks that only put a request in other words: the request itself, prefilled replies, demonstrations,
templates, noise.

Each is a set of variants (variants.py) and a chooser (choosers.py); the classes below are names for the
published combinations, so that a YAML says `Templates` rather than how it is put together.
"""

from __future__ import annotations

import random
from typing import Literal

import torch

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, Share, checked
from datamodules.sources.base import HarmfulSource
from lightning_modules.attacks.base import AttackedPrompt, draw_seed, example_rngs, require_texts
from lightning_modules.attacks.text.choosers import Chooser, Likeliest
from lightning_modules.attacks.text.variants import (
    AsItIs,
    Augmented,
    Demonstrated,
    Misspelt,
    Prefilled,
    Variants,
    Wrapped,
)
from lightning_modules.models.language_model import LanguageModel


class Rewrite:
    """Any variants with any chooser.

    Args:
        variants: ways to put a request.
        chooser: which of them becomes the attack; null takes the one under which the target is likeliest.
    """

    def __init__(self, variants: Variants, chooser: Chooser | None = None) -> None:
        self.variants = variants
        self.chooser: Chooser = chooser or Likeliest()

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. Raises: ValueError without texts."""
        require_texts(batch)
        seeds = [draw_seed(own) for own in example_rngs(batch, rng)]
        texts = zip(batch.prompts, batch.targets, seeds, strict=True)
        variants = [self.variants(prompt, target, random.Random(seed)) for prompt, target, seed in texts]
        with model.frozen():
            return self.chooser(model, batch, variants)


@checked
class DirectRequest(Rewrite):
    """The request as it is: what every attack must be compared with.

    Args:
        chooser: sets batch size and length of replies here, where there is nothing to choose.
    """

    def __init__(self, chooser: Chooser | None = None) -> None:
        super().__init__(AsItIs(), chooser)


@checked
class Prefilling(Rewrite):
    """Forces the reply to begin with the target's first tokens, as an API that lets the caller start the
    reply would.

    Args:
        num_tokens: forced tokens; DirectRequest forces none.
        chooser: as in Rewrite.
    """

    def __init__(self, num_tokens: Count = 5, chooser: Chooser | None = None) -> None:
        super().__init__(Prefilled(num_tokens), chooser)


@checked
class InContext(Rewrite):
    """Puts harmful requests with compliant replies before the request, as earlier turns (ICL; many-shot with
    a large count).

    Args:
        source: harmful requests to demonstrate with; the attacked request itself is never shown.
        num_shots: demonstrations.
        num_samples: different random choices of demonstrations to try.
        chooser: as in Rewrite.
    """

    def __init__(
        self,
        source: HarmfulSource,
        num_shots: Count = 5,
        num_samples: Count = 1,
        chooser: Chooser | None = None,
    ) -> None:
        super().__init__(Demonstrated(source, num_shots, num_samples), chooser)


@checked
class Templates(Rewrite):
    """Wraps the request in jailbreak templates: role play, prompt injection, encodings, or a published set.

    Args:
        templates: name of a shipped set (`role_play`, `prompt_injection`, `encodings`, `all`), or a csv
            (column `text`), json or text file. A template marks the request's place by {prompt}, [INSERT
            PROMPT HERE] or [REPLACE]; without a mark it goes last.
        limit: use only the first so many templates; null for all.
        chooser: as in Rewrite.
    """

    def __init__(
        self, templates: str = "all", limit: Count | None = None, chooser: Chooser | None = None
    ) -> None:
        super().__init__(Wrapped(templates, limit), chooser)


@checked
class BestOfN(Rewrite):
    """Best-of-N jailbreaking: random capitalisation, scrambling and character noise, many times (Hughes et
    al. 2024, arXiv 2412.03556).

    Args:
        num_samples: augmented prompts per request.
        sigma: strength of the augmentation.
        chooser: FirstSuccess sends the prompts until a judge accepts a reply, as the published attack does.
    """

    def __init__(self, num_samples: Count = 1000, sigma: Share = 0.4, chooser: Chooser | None = None) -> None:
        super().__init__(Augmented(num_samples, sigma), chooser)


@checked
class Noise(Rewrite):
    """Typing errors at a given rate: the robustness of refusals to honest noise rather than to an adversary.

    Args:
        level: `character` swaps, drops, doubles and replaces letters; `word` drops, doubles and swaps words.
        rate: share of characters or words that are changed.
        num_samples: noisy prompts per request.
        chooser: as in Rewrite.
    """

    def __init__(
        self,
        level: Literal["character", "word"] = "character",
        rate: Share = 0.1,
        num_samples: Count = 1,
        chooser: Chooser | None = None,
    ) -> None:
        super().__init__(Misspelt(level, rate, num_samples), chooser)
