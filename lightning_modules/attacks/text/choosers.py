"""Which of a request's variants becomes the attack: the one whose target is likeliest, or the first whose
reply a judge accepts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice
from typing import Protocol

import torch

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, NonNegative, checked
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.text.search import TextSearch
from lightning_modules.attacks.text.variants import Variant
from lightning_modules.attacks.verdicts import Verdict, verdicts
from lightning_modules.models.language_model import LanguageModel


class Chooser(Protocol):
    """Tries one list of variants per request and returns each request's chosen one."""

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, variants: Sequence[Sequence[Variant]]
    ) -> AttackedPrompt: ...


@checked
class Likeliest:
    """The variant under which the target has the lowest loss; needs the model's probabilities.

    Args:
        max_rows: variants per forward pass; halved and remembered when memory runs out.
        max_new_tokens: room to leave for a reply.
    """

    def __init__(self, max_rows: Count = 64, max_new_tokens: Count = 64) -> None:
        self.max_rows = max_rows
        self.max_new_tokens = max_new_tokens

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, variants: Sequence[Sequence[Variant]]
    ) -> AttackedPrompt:
        """Score all variants. Raises: ValueError without texts."""
        search = TextSearch(model, batch, self.max_rows, self.max_new_tokens)
        _score(search, variants)
        return search.result()


@checked
class FirstSuccess:
    """Sends the variants in turn until the judge accepts a reply: black box, as published Best-of-N is. Where
    none is accepted, the likeliest one stays.

    Args:
        judge: whether a reply is a success.
        at_once: variants of a request that are sent and judged together; all of them count as queries.
        max_rows: variants per batch; halved and remembered when memory runs out.
        max_new_tokens: longest reply that the judge reads.
        temperature: of the replies; 0 takes the greedy one, which is what an evaluation counts beside sampled
            ones. Published Best-of-N samples at 1: let the evaluation sample too (`sampling`).
    """

    def __init__(
        self,
        judge: Verdict,
        at_once: Count = 1,
        max_rows: Count = 64,
        max_new_tokens: Count = 64,
        temperature: NonNegative = 0.0,
    ) -> None:
        self.judge = judge
        self.at_once = at_once
        self.max_rows = max_rows
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, variants: Sequence[Sequence[Variant]]
    ) -> AttackedPrompt:
        """Send, judge, choose. Raises: ValueError without texts."""
        search = TextSearch(model, batch, self.max_rows, self.max_new_tokens)
        losses = _score(search, variants)
        waiting = {row: iter(enumerate(own)) for row, own in enumerate(variants)}
        for turn in count():
            tried = [(row, *entry) for row, own in waiting.items() for entry in islice(own, self.at_once)]
            if not tried:
                break
            rows, sent = [row for row, _, _ in tried], [variant for _, _, variant in tried]
            accepted = verdicts(
                self.judge,
                [batch.prompts[row] for row in rows],
                # A turn is at most some thousands of prompts long, so that no two share a seed.
                search.replies(rows, sent, self.temperature, turn << 20),
                [batch.targets[row] for row in rows],
            )
            for (row, number, variant), success in zip(tried, accepted, strict=True):
                if success and row in waiting:
                    search.ledger.keep(row, variant, losses[row][number])
                    del waiting[row]
        return search.result()


def _score(search: TextSearch, variants: Sequence[Sequence[Variant]]) -> list[list[float]]:
    """Losses of all variants; the curve has one entry per variant, whatever batches they were scored in."""
    rows = [row for row, own in enumerate(variants) for _ in own]
    flat = search.losses(rows, [variant for own in variants for variant in own])
    losses = [part.tolist() for part in flat.split([len(own) for own in variants])]
    for number in range(max(map(len, variants))):
        having = [row for row, own in enumerate(variants) if number < len(own)]
        tried = [variants[row][number] for row in having]
        search.ledger.record(having, tried, torch.tensor([losses[row][number] for row in having]))
    return losses
