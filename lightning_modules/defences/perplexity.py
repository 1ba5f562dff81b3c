"""Perplexity filter (Jain et al. 2023, arXiv 2309.00614; Alon and Kamfonas 2023, arXiv 2308.14132): a request
whose tokens are less likely than those of benign ones is flagged.

The threshold is calibrated, not guessed (calibrated.py).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch

from datamodules.batch import pad
from datamodules.fields import Count, Positive, Share, checked
from datamodules.rows import ChatRow
from datamodules.sources.base import ChatSource
from datamodules.text.chat_format import ChatFormat
from lightning_modules.defences.base import ROWS_AT_ONCE, without_documents
from lightning_modules.defences.calibrated import Threshold, rows_of
from lightning_modules.defences.filtered import Check
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Request


class Scorer(Protocol):
    """How surprising the tokens of a text are."""

    def nats(self, model: LanguageModel, texts: Sequence[str]) -> list[list[float]]:
        """-log p of every token of every text."""
        ...

    @property
    def asks_model(self) -> bool:
        """Whether a text costs a pass of the model."""
        ...


class ModelNats:
    """By the model behind the filter, as the user's text of a conversation."""

    asks_model = True

    @torch.no_grad()
    def nats(self, model: LanguageModel, texts: Sequence[str]) -> list[list[float]]:
        """One forward pass each."""
        found: list[list[float]] = []
        for start in range(0, len(texts), ROWS_AT_ONCE):
            prompts = [model.chat.prompt(text) for text in texts[start : start + ROWS_AT_ONCE]]
            ids, mask = (t.to(model.device) for t in pad([prompt.ids for prompt in prompts], "right"))
            labels = torch.full_like(ids, -100)
            for row, prompt in enumerate(prompts):
                own = torch.tensor(prompt.attackable("user"), device=ids.device)
                labels[row, : len(own)][own] = ids[row, : len(own)][own]
            log_probs, scored = model.labelled_log_probs(ids, mask, labels)
            found += [(-own[where]).tolist() for own, where in zip(log_probs, scored, strict=True)]
        return found


@checked
class NgramNats:
    """By bigrams of tokens in benign requests: for models that were never trained to predict the user.

    Args:
        source: benign requests to count in; others than those that calibrate.
        limit: so many of its rows, evenly spaced.
        weight: how many counts the unigram share is worth where a bigram is rare (Dirichlet prior).
    """

    asks_model = False

    def __init__(self, source: ChatSource, limit: Count = 2000, weight: Positive = 1.0) -> None:
        self.source = source
        self.limit = limit
        self.weight = weight

    def nats(self, model: LanguageModel, texts: Sequence[str]) -> list[list[float]]:
        """p(t | s) = (c(s, t) + w p(t)) / (c(s) + w),  p(t) = (c(t) + 1) / (N + V)."""
        pairs, firsts, single = self._counted(model.chat)
        total = sum(single.values()) + len(model.chat.tokenizer)
        found = []
        for ids in model.chat.encode_batch([text.strip() for text in texts]):
            own = []
            for before, token in itertools.pairwise([-1, *ids]):
                alone = (single[token] + 1) / total
                share = (pairs[before, token] + self.weight * alone) / (firsts[before] + self.weight)
                own.append(-math.log(share))
            found.append(own)
        return found

    def _counted(self, chat: ChatFormat) -> tuple[Counter[tuple[int, int]], Counter[int], Counter[int]]:
        key = chat.tokenizer.name_or_path, len(chat.tokenizer)
        if key not in self._known:
            rows = chat.encode_batch([text.strip() for text in _texts(rows_of(self.source, self.limit))])
            pairs = Counter(pair for ids in rows for pair in itertools.pairwise([-1, *ids]))
            firsts = Counter(token for ids in rows for token in [-1, *ids][:-1])
            self._known[key] = pairs, firsts, Counter(token for ids in rows for token in ids)
        return self._known[key]

    @cached_property
    def _known(
        self,
    ) -> dict[tuple[str, int], tuple[Counter[tuple[int, int]], Counter[int], Counter[int]]]:
        return {}


@checked
class PerplexityFilter:
    """Flags requests whose mean surprise (of the whole, or of the worst window) is above a threshold.

    Args:
        benign: requests that calibrate the threshold, of training or validation, never of test.
        false_positive_rate: the share of such requests that may be flagged.
        num_calibration: so many of them.
        window: tokens of a window, the worst of which counts; null takes the whole text.
        scorer: what finds tokens surprising; null asks the model behind the filter.

    Raises: ValueError where so few requests cannot hold the rate, with the smallest number that can.
    """

    name = "perplexity_filter"

    def __init__(
        self,
        benign: ChatSource,
        false_positive_rate: Share = 0.05,
        num_calibration: Count = 500,
        window: Count | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        self.benign = benign
        self.false_positive_rate = false_positive_rate
        self.num_calibration = num_calibration
        self.window = window
        self.scorer: Scorer = scorer or ModelNats()
        self._threshold = Threshold(type(self).__name__, benign, false_positive_rate, num_calibration)

    def checks(self, model: LanguageModel, requests: Sequence[Request]) -> list[Check]:
        """The score's distance from the threshold, in nats per token, of the worst of all that the user has
        said; the benign requests that calibrate it are single ones, so that of k turns up to k times the
        stated rate is flagged.

        Raises: ValueError for a request with a document.
        """
        without_documents(type(self).__name__, requests)
        limit = self.threshold(model)
        turns = [[*(said for said, _ in request.history), request.text] for request in requests]
        # Each text once: a request with tokens erased (erase-and-check) has the earlier turns of all others.
        texts = list(dict.fromkeys(text for own in turns for text in own))
        known = dict(zip(texts, zip(*self._scored(model, texts), strict=True), strict=True))
        asked = self.scorer.asks_model
        found = []
        for own in turns:
            scores, counts = zip(*(known[text] for text in own), strict=True)
            found.append(Check(max(scores) - limit, asked * len(own), asked * sum(counts)))
        return found

    def scores(self, model: LanguageModel, texts: Sequence[str]) -> list[float]:
        """Mean nats per token of the whole text, or of its worst window."""
        return self._scored(model, texts)[0]

    def threshold(self, model: LanguageModel) -> float:
        """What benign requests calibrate, in nats per token; found once for a model's weights.

        Raises: ValueError where the source has fewer requests than were asked for.
        """
        return self._threshold.of(model, lambda own, rows: self.scores(own, _texts(rows)))

    def _scored(self, model: LanguageModel, texts: Sequence[str]) -> tuple[list[float], list[int]]:
        every = self.scorer.nats(model, texts)
        return [worst_window(own, self.window) for own in every], [len(own) for own in every]


def _texts(rows: Sequence[ChatRow]) -> list[str]:
    return [row.prompt for row in rows]


def worst_window(nats: Sequence[float], window: int | None) -> float:
    """The largest mean over consecutive tokens, so many at once; over all of a shorter text."""
    if window is None or window >= len(nats):
        return math.fsum(nats) / max(1, len(nats))
    return max(math.fsum(nats[i : i + window]) / window for i in range(len(nats) - window + 1))
