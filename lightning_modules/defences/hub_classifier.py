"""Any sequence classifier of transformers as what a learned filter asks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from datamodules.fields import Count, checked
from lightning_modules.defences.base import ROWS_AT_ONCE
from lightning_modules.models.language_model import LanguageModel


@checked
class HubClassifier:
    """A published classifier of texts, loaded when first asked, on the device of the model behind the filter.

    Args:
        name_or_path: a hub id or a folder, with its tokenizer and weights as safetensors.
        harmful: labels of `id2label` that mean harm; their probabilities are summed.
        revision: commit of a hub id; pin it.
        max_length: tokens of a text that are read at most.
    """

    def __init__(
        self, name_or_path: str, harmful: list[str], revision: str | None = None, max_length: Count = 512
    ) -> None:
        self.name_or_path = name_or_path
        self.harmful = harmful
        self.revision = revision
        self.max_length = max_length

    @torch.no_grad()
    def log_odds(self, model: LanguageModel, texts: Sequence[str]) -> list[float]:
        """One pass of the classifier each. Raises: ValueError for a label that it does not have, or where all
        of its labels mean harm."""
        classifier, found = self._loaded[0].to(model.device), list[float]()
        known = classifier.config.id2label
        chosen = [number for number, name in known.items() if name in self.harmful]
        others = [number for number in known if number not in chosen]
        if len(chosen) < len(set(self.harmful)) or not chosen or not others:
            raise ValueError(
                f"HubClassifier.harmful: expected some of {sorted(known.values())}, not all of them, got "
                f"{self.harmful}"
            )
        for start in range(0, len(texts), ROWS_AT_ONCE):
            encoded = self._encoded(texts[start : start + ROWS_AT_ONCE], padding=True, return_tensors="pt")
            shares = classifier(**encoded.to(model.device)).logits.float().log_softmax(1)
            found += (shares[:, chosen].logsumexp(1) - shares[:, others].logsumexp(1)).tolist()
        return found

    def read(self, model: LanguageModel, texts: Sequence[str]) -> list[int]:
        """Tokens of its own tokenizer."""
        return [len(ids) for ids in self._encoded(list(texts))["input_ids"]] if texts else []

    def _encoded(self, texts: Sequence[str], **settings: Any) -> Any:
        return self._loaded[1](list(texts), truncation=True, max_length=self.max_length, **settings)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        own: dict[str, Any] = {"revision": self.revision}
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(
            self.name_or_path, use_safetensors=True, **own
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(self.name_or_path, **own)
        return classifier.eval(), tokenizer
