"""Any sequence classifier of transformers as what a learned filter or a reply filter asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from datamodules.fields import Count, checked
from lightning_modules.defences.base import ROWS_AT_ONCE
from lightning_modules.defences.exchange import Exchange
from lightning_modules.models.language_model import LanguageModel


@checked
class HubClassifier:
    """A published classifier of texts, loaded when first asked, on the device of the model behind the filter.

    A conversation is one text: earlier turns, the user's text, the document, the reply. The system message is
    left out: harm in it is not seen. What is longer than the classifier can take is read in windows that
    overlap by a quarter, and the most harmful one counts.

    Args:
        name_or_path: a hub id or a folder, with its fast tokenizer and weights as safetensors.
        harmful: labels of `id2label` that mean harm; their probabilities are summed.
        revision: commit of a hub id; pin it.
        max_length: tokens of a window, special ones included.
        reads: `conversation`, or of replies `reply` alone, for classifiers that were trained on such.
    """

    def __init__(
        self,
        name_or_path: str,
        harmful: list[str],
        revision: str | None = None,
        max_length: Count = 512,
        reads: Literal["conversation", "reply"] = "conversation",
    ) -> None:
        self.name_or_path = name_or_path
        self.harmful = harmful
        self.revision = revision
        self.max_length = max_length
        self.reads: Literal["conversation", "reply"] = reads

    @torch.no_grad()
    def log_odds(self, model: LanguageModel, exchanges: Sequence[Exchange]) -> list[float]:
        """One pass of the classifier a window. Raises: ValueError for a label that it does not have, where
        all of its labels mean harm, where it reads replies and is asked about a request, or for logits that
        are not finite, which would be read as harmless."""
        classifier, found = self._loaded[0].to(model.device), list[float]()
        known = classifier.config.id2label
        chosen = [number for number, name in known.items() if name in self.harmful]
        others = [number for number in known if number not in chosen]
        if len(chosen) < len(set(self.harmful)) or not chosen or not others:
            raise ValueError(
                f"HubClassifier.harmful: expected some of {sorted(known.values())}, not all of them, got "
                f"{self.harmful}"
            )
        for start in range(0, len(exchanges), ROWS_AT_ONCE):
            part = exchanges[start : start + ROWS_AT_ONCE]
            windows, owners = self._windows(part, padding=True, return_tensors="pt")
            odds = [-math.inf] * len(part)
            for first in range(0, len(owners), ROWS_AT_ONCE):
                rows = {
                    name: own[first : first + ROWS_AT_ONCE].to(model.device) for name, own in windows.items()
                }
                logits = classifier(**rows).logits.float()
                if not logits.isfinite().all():
                    raise ValueError(
                        "HubClassifier.name_or_path: expected finite logits, got NaN or infinity from "
                        f"{self.name_or_path} in {classifier.dtype}; store it in float32, or take another"
                    )
                shares = logits.log_softmax(1)
                scores = (shares[:, chosen].logsumexp(1) - shares[:, others].logsumexp(1)).tolist()
                for owner, score in zip(owners[first : first + ROWS_AT_ONCE], scores, strict=True):
                    odds[owner] = max(odds[owner], score)
            found += odds
        return found

    def read(self, model: LanguageModel, exchanges: Sequence[Exchange]) -> list[int]:
        """Tokens of its own tokenizer, those that two windows share twice."""
        found = [0] * len(exchanges)
        if exchanges:
            windows, owners = self._windows(exchanges)
            for owner, ids in zip(owners, windows["input_ids"], strict=True):
                found[owner] += len(ids)
        return found

    def _windows(self, exchanges: Sequence[Exchange], **settings: Any) -> tuple[dict[str, Any], list[int]]:
        """What the classifier is fed, and whose text each window is of."""
        tokenizer = self._loaded[1]
        room = self.max_length - tokenizer.num_special_tokens_to_add()
        found = tokenizer(
            [self._text(own) for own in exchanges],
            truncation=True,
            max_length=self.max_length,
            stride=room // 4,
            return_overflowing_tokens=True,
            **settings,
        )
        owners = [int(own) for own in found.pop("overflow_to_sample_mapping")]
        return dict(found), owners

    def _text(self, exchange: Exchange) -> str:
        if self.reads == "conversation":
            return exchange.text
        if exchange.reply is None:
            raise ValueError(
                "HubClassifier.reads: expected conversation for a filter of requests, got reply; set "
                "reads: conversation, or take a reply filter"
            )
        return exchange.reply

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        own: dict[str, Any] = {"revision": self.revision}
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(
            self.name_or_path, use_safetensors=True, **own
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(self.name_or_path, **own)
        if not tokenizer.is_fast:
            raise ValueError(
                "HubClassifier.name_or_path: expected a fast tokenizer, which can cut texts into windows, "
                f"got {type(tokenizer).__name__} of {self.name_or_path}; add a tokenizer.json or take another"
            )
        return classifier.eval(), tokenizer
