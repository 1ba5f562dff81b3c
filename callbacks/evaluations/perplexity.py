"""Perplexity on a text, e.g. WikiText-2: what training costs in plain language modelling.

The text is one stream of tokens behind the tokenizer's BOS (EOS where it has none), as in the
lm-evaluation-harness. Windows of at most `context` tokens move on by `stride`; each scores the tokens that
the one before it did not, so that every token is scored once. A window is a row, with its nats and its
tokens, words and bytes, so that n, intervals and the paired difference before and after training come from
rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from callbacks.evaluations.asking import Work
from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place
from callbacks.evaluations.undisturbed import undisturbed
from datamodules.batch import pad
from datamodules.fields import Count, checked
from datamodules.result_lines import Identity, Measurement, Row
from datamodules.settings import settings_digest
from datamodules.sources.gather import evenly
from lightning_modules.models.decoder import text_config
from lightning_modules.models.language_model import LanguageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """Tokens that are scored, with those before them that are in sight."""

    key: str
    ids: list[int]
    scored: int
    """How many of `ids`, at the end, are scored."""
    text: str
    """What the scored tokens spell."""
    words: int
    """Words, apart by white space, that begin in `text`."""


@checked
class PerplexityEvaluation(Evaluation):
    """Perplexity per token, per word and per byte of texts.

    Args:
        texts: name of each text, as tables show it, and its file (UTF-8).
        context: tokens in sight at most, those that are scored included.
        stride: tokens that a window scores: each of them sees at least context - stride earlier ones, but for
            the text's beginning.
        max_tokens: score the text's first so many tokens; null scores all.
        batch_size: windows that are scored at once, and that a kill costs at most.
        schedule: when it runs and on how many windows of each text (evenly spaced); null takes the defaults.

    Raises: ValueError where no text is named, or the stride leaves no context.
    """

    name = "perplexity"

    def __init__(
        self,
        texts: dict[str, str],
        context: Count = 1024,
        stride: Count = 512,
        max_tokens: Count | None = 50_000,
        batch_size: Count = 8,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(schedule)
        if not texts:
            raise ValueError("PerplexityEvaluation.texts: expected one or several, got none; name a file")
        if stride >= context:
            raise ValueError(
                f"PerplexityEvaluation.stride: expected less than context ({context}), got {stride}; lower it"
            )
        self.texts = texts
        self.context, self.stride = context, stride
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self._windows: dict[str, list[Window]] = {}

    def probes(self) -> list[Probe]:
        """None: the texts are not the evaluation data's."""
        return []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises: ValueError for a text that cannot be read, before anything is trained."""
        super().setup(trainer, pl_module, stage)
        for name, path in self.texts.items():
            read_text(f"PerplexityEvaluation.texts.{name}", path)

    def work(self, place: Place, weights: str) -> list[tuple[Measurement, list[Work]]]:
        """One measurement a text; its batches of windows are dealt out to the processes in turn."""
        longest = getattr(text_config(place.model.module), "max_position_embeddings", None)
        if longest is not None and self.context > longest:
            raise ValueError(
                f"PerplexityEvaluation.context: expected at most the model's {longest} positions, got "
                f"{self.context}; lower context, and stride with it"
            )
        found: list[tuple[Measurement, list[Work]]] = []
        for name in self.texts:
            measurement, batches = self._planned(name, place, weights)
            found.append((measurement, list(batches[place.rank :: place.world_size])))
        return found

    def _planned(self, name: str, place: Place, weights: str) -> tuple[Measurement, list[WindowBatch]]:
        if name not in self._windows:
            self._windows[name] = self._read(name, place.model.chat.tokenizer)
        every = self._windows[name]
        windows = evenly(every, self.schedule.rows(place.stage))
        judge = f"sliding_window@context={self.context},stride={self.stride}"
        measurement = place.measurement(
            self.name,
            weights,
            settings=settings_digest(
                judge, place.precision, [[window.ids, window.scored] for window in windows]
            ),
            subject="utility",
            quantity="token_perplexity",
            judge=judge,
            n=len(windows),
            block=name,
        )
        batches = place.parts(windows, self.batch_size)
        return measurement, [WindowBatch(measurement, own) for own in batches]

    def _read(self, name: str, tokenizer: Any) -> list[Window]:
        where = f"PerplexityEvaluation.texts.{name}"
        text = read_text(where, self.texts[name])
        found = windows_of(text, tokenizer, self.context, self.stride, self.max_tokens, name)
        unknown = tokenizer.unk_token_id
        lost = 0 if unknown is None else sum(w.ids[-w.scored :].count(unknown) for w in found)
        if lost:
            log.warning(
                "%s: the tokenizer does not know %d tokens of the text: perplexities per word and byte are "
                "too low to be compared with another tokenizer's",
                name,
                lost,
            )
        if len(found) < 2:
            raise ValueError(
                f"{where}: expected a text of two windows or more, got {len(found)}; lower stride "
                f"({self.stride}), raise max_tokens, or give a longer text"
            )
        return found


@dataclass(frozen=True)
class WindowBatch:
    """Windows that are scored together."""

    measurement: Measurement
    windows: Sequence[Window]

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def title(self) -> str:
        return f"{self.measurement.evaluation}: {self.measurement.block}"

    @property
    def identities(self) -> list[Identity]:
        return [self.measurement.identity(window.key) for window in self.windows]

    def replied(self, model: LanguageModel) -> list[Row]:
        """A row a window; what it should have said is the text, and its score the nats."""
        own = self.measurement
        rows = []
        for window, nats in zip(self.windows, window_nats(model, self.windows), strict=True):
            if not math.isfinite(nats):
                log.warning("%s: %s: the model's log-likelihood is no number", own.block, window.key)
            score = nats if math.isfinite(nats) else None
            counts = {"tokens": window.scored, "words": window.words, "bytes": len(window.text.encode())}
            verdicts = {own.judge: {"verdict": None, "score": score}}
            rows.append(own.row(window.key, "", window.text, verdicts=verdicts, counts=counts))
        return rows


def read_text(where: str, path: str) -> str:
    """The file's text as it is. Raises: ValueError naming the field for a file that is no text or empty."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 ({error.reason})"
        raise ValueError(f"{where}: cannot read {path!r}: {reason}; give a text file") from error
    if not text.strip():
        raise ValueError(f"{where}: expected a text, got an empty one in {path!r}; give another file")
    return text


def windows_of(
    text: str, tokenizer: Any, context: int, stride: int, max_tokens: int | None = None, name: str = "text"
) -> list[Window]:
    """The windows that score every token once; their texts, joined, are what the scored tokens spell.

    Args:
        text: the whole text; it is tokenised at once.
        tokenizer: a tokenizer that tells where its tokens stand.
        context: tokens in sight at most.
        stride: tokens that a window scores; less than `context`.
        max_tokens: the text's first so many tokens; null takes all.
        name: in front of every key.

    Raises: ValueError for a tokenizer without offsets, or with neither BOS nor EOS.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None or not tokenizer.is_fast:
        lacks = "a BOS or EOS token" if first is None else "offsets (a fast one)"
        raise ValueError(f"perplexity: expected a tokenizer with {lacks}, got none; use another tokenizer")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    n = min(len(encoded["input_ids"]), max_tokens or len(encoded["input_ids"]))
    stream = [first, *encoded["input_ids"][:n]]
    offsets = encoded["offset_mapping"]
    # Parts of one character stand at the same place: it belongs to the window with the first of them.
    ends = [*(offsets[i][0] for i in range(stride, n, stride)), _end(offsets, n, len(text))]
    found, begin = [], 0
    for number, end in enumerate(ends):
        start, stop = number * stride, min((number + 1) * stride, n)
        own = text[begin:end]
        begun = begin == 0 or text[begin - 1].isspace()
        words = len(own.split()) - (not begun and own[:1].strip() != "")
        ids = stream[max(0, stop + 1 - context) : stop + 1]
        found.append(Window(f"{name}/{number:06d}", ids, stop - start, own, words))
        begin = end
    return found


def _end(offsets: Sequence[tuple[int, int]], n: int, length: int) -> int:
    """Where the n-th token ends; of the whole text, its end, with the space that no token stands for."""
    return length if n == len(offsets) else offsets[n][0]


@torch.no_grad()
def window_nats(model: LanguageModel, windows: Sequence[Window]) -> list[float]:
    """Negative log-likelihood, in nats, of every window's scored tokens given those before them."""
    ids, mask = (tensor.to(model.device) for tensor in pad([window.ids for window in windows], "right"))
    labels = torch.full_like(ids, -100)
    for i, window in enumerate(windows):
        scored = slice(len(window.ids) - window.scored, len(window.ids))
        labels[i, scored] = ids[i, scored]
    with undisturbed(model.module):
        log_probs, _ = model.labelled_log_probs(ids, mask, labels)
    return [-float(own) for own in log_probs.double().sum(1)]
