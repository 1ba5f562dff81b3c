"""The request with a suffix attack's un-optimised initial suffix: what a searched suffix must be compared
with."""

from __future__ import annotations

import torch

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, checked
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.attacks.suffix.slots import Placement
from lightning_modules.models.language_model import LanguageModel


@checked
class InitialSuffix:
    """Appends the initial suffix of GCG and scores it; no search.

    Args:
        num_tokens: length of the suffix; DirectRequest has none.
        init: text repeated to make it, as in GCG.
        place: where it stands, as in GCG.
        max_rows: prompts per forward pass; null takes 64 on a CPU and 512 elsewhere; halved and remembered
            when memory runs out.
    """

    def __init__(
        self,
        num_tokens: Count = 20,
        init: str = " x",
        place: Placement = "after",
        max_rows: Count | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        self.place: Placement = place
        self.init = init
        self.max_rows = max_rows

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Score the suffix. Raises: ValueError without texts."""
        with model.frozen():
            search = SuffixSearch(model, batch, self.num_tokens, self.init, self.max_rows, place=self.place)
            search.record_start()
            return search.result()
