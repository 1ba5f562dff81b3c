"""A suffix search over a few prompts, and its losses by a plain loop."""

from __future__ import annotations

import torch

from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.reply import Reply
from tests.conftest import text_batch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def search_of(
    language_model: LanguageModel, size: int = 3, num_tokens: int = 5, **settings: int
) -> SuffixSearch:
    return SuffixSearch(language_model, text_batch(size), num_tokens, " x", 512, **settings)


def plain_losses(
    language_model: LanguageModel, search: SuffixSearch, row: int, suffix: list[int]
) -> torch.Tensor:
    """Token losses of one candidate from the whole prompt, without any cache."""
    ids = torch.tensor([search.slots[row].ids(suffix)])
    reply = Reply(search.target.ids[row : row + 1], search.target.mask[row : row + 1])
    (scores,) = language_model.reply_log_probs(
        language_model.embed(ids), torch.ones_like(ids, dtype=torch.bool), reply
    )
    return -scores[0].detach()
