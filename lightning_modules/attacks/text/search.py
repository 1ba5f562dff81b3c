"""What attacks that rewrite whole prompts share: variants of a request, their target losses and the replies
they get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from datamodules.batch import AdversarialBatch, pad
from datamodules.text.chat_format import Turn
from lightning_modules.attacks.base import AttackedPrompt, require_texts
from lightning_modules.attacks.chunks import Chunked
from lightning_modules.attacks.progress import notify
from lightning_modules.attacks.suffix.slots import without_end_of_turn
from lightning_modules.models.decoder import text_config
from lightning_modules.models.language_model import LanguageModel, Reply
from lightning_modules.models.likelihood import mean_cross_entropy


class Verdict(Protocol):
    """A judge as attacks see it: whether a completion is what the attacker wants."""

    def __call__(self, prompt: str, completion: str, reference: str) -> bool: ...


@dataclass(frozen=True)
class Variant:
    """One way to put a request: the user's text, earlier turns, and how many tokens of the target the reply
    is forced to begin with."""

    text: str
    history: tuple[Turn, ...] = ()
    forced: int = 0


@dataclass(frozen=True)
class Encoded:
    """A variant as ids: forced tokens are part of the prompt, `target` is what is left of the target after
    them."""

    prompt: list[int]
    target: list[int]


class TextSearch:
    """B requests and the best variant of each, during one attack. The model must be frozen meanwhile.

    Args:
        model: the model under attack, with its chat format.
        batch: prompts and targets as text and as ids.
        max_rows: variants per forward pass to start with.
        max_new_tokens: longest reply asked of the model.
    """

    def __init__(
        self, model: LanguageModel, batch: AdversarialBatch, max_rows: int = 64, max_new_tokens: int = 64
    ) -> None:
        require_texts(batch)
        self.model, self.batch, self.chat = model, batch, model.chat
        self.chunked = Chunked(max_rows)
        self.max_new_tokens = max_new_tokens
        self.limit = getattr(text_config(model.module), "max_position_embeddings", None) or 1 << 20
        mask = without_end_of_turn(batch.harmful_ids, batch.harmful_mask, self.chat.end_of_turn)
        self.targets = [ids[keep].tolist() for ids, keep in zip(batch.harmful_ids, mask, strict=True)]
        size = len(batch)
        self.best = [Variant(prompt) for prompt in batch.prompts]
        self.best_loss = torch.full((size,), torch.inf)
        self.forward_passes = torch.zeros(size, dtype=torch.long)
        self.queries = torch.zeros(size, dtype=torch.long)
        self.curve: list[Tensor] = []

    def encode(self, row: int, variant: Variant) -> Encoded | None:
        """The variant as ids, None where the template refuses its text or the model cannot take its
        length."""
        try:
            prompt = self.chat.prompt(variant.text, self.batch.systems[row], variant.history).ids
        except ValueError:
            return None
        target, forced = self.targets[row], self._forced(row, variant)
        fits = len(prompt) + max(len(target), self.max_new_tokens) <= self.limit
        return Encoded(prompt + forced, target[len(forced) :]) if fits else None

    def _forced(self, row: int, variant: Variant) -> list[int]:
        """The target's first tokens that the variant forces; at least one is left to the model."""
        return self.targets[row][: min(variant.forced, len(self.targets[row]) - 1)]

    def losses(self, rows: Sequence[int], variants: Sequence[Variant]) -> Tensor:
        """(N,) attacked loss of every variant (of what is not forced), inf where it cannot be sent."""
        encoded = [self.encode(row, variant) for row, variant in zip(rows, variants, strict=True)]
        usable = [i for i, entry in enumerate(encoded) if entry is not None]
        found = torch.full((len(rows),), torch.inf)
        # Rows of like length share a batch, so that little of it is padding.
        usable.sort(key=lambda i: len(encoded[i].prompt))  # type: ignore[union-attr]
        if usable:
            with torch.no_grad():
                found[usable] = self.chunked(
                    lambda places: self._losses([encoded[i] for i in places.tolist()]), torch.tensor(usable)
                )  # type: ignore[misc]
        self.forward_passes += torch.bincount(
            torch.tensor([rows[i] for i in usable], dtype=torch.long), minlength=len(self.best)
        )
        return found

    def replies(self, rows: Sequence[int], variants: Sequence[Variant]) -> list[str]:
        """Greedy replies, forced tokens included; '' where a variant cannot be sent."""
        encoded = [self.encode(row, variant) for row, variant in zip(rows, variants, strict=True)]
        usable = [i for i, entry in enumerate(encoded) if entry is not None]
        replies = [""] * len(rows)
        for start in range(0, len(usable), self.chunked.max_rows):
            places = usable[start : start + self.chunked.max_rows]
            ids, mask = self._padded([encoded[i].prompt for i in places])  # type: ignore[union-attr]
            with torch.no_grad():
                out = self.model.generate(
                    self.model.embed(ids), mask, self.max_new_tokens, self.chat.stop_ids
                )
            for place, generated in zip(places, out, strict=True):
                replies[place] = self.chat.decode(self._forced(rows[place], variants[place]) + generated)
        self.queries += torch.bincount(
            torch.tensor([rows[i] for i in usable], dtype=torch.long), minlength=len(self.best)
        )
        return replies

    def record(self, rows: Sequence[int], variants: Sequence[Variant], losses: Tensor) -> None:
        """Enter one iterate; several variants of a row count as one, by the best of them."""
        row_of_curve = torch.full((len(self.best),), torch.nan)
        for row, variant, loss in zip(rows, variants, losses.tolist(), strict=True):
            if loss < float("inf"):
                row_of_curve[row] = min(loss, float(row_of_curve[row].nan_to_num(torch.inf)))
                if loss < self.best_loss[row]:
                    self.keep(row, variant, loss)
        self.curve.append(row_of_curve)
        notify(row_of_curve, lambda: [variant.text for variant in self.best])

    def keep(self, row: int, variant: Variant, loss: float) -> None:
        """Make a variant the row's result, whatever was found before."""
        self.best[row], self.best_loss[row] = variant, loss

    def result(self) -> AttackedPrompt:
        """The best variants; a row of which none could be sent keeps its plain request.

        Raises: ValueError where not even that can be sent.
        """
        encoded = []
        for row, variant in enumerate(self.best):
            entry = self.encode(row, variant)
            if entry is None:
                raise ValueError(
                    f"the request {variant.text[:60]!r} does not fit the model's {self.limit} "
                    "positions; set a shorter max_new_tokens"
                )
            encoded.append(entry)
        prompt_ids, prompt_mask = self._padded([entry.prompt for entry in encoded])
        size, device = len(self.best), prompt_ids.device
        return AttackedPrompt(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            delta=None,
            loss_curve=torch.stack(self.curve).to(device)
            if self.curve
            else torch.empty(0, size, device=device),
            forward_passes=self.forward_passes.to(device),
            backward_passes=torch.zeros(size, dtype=torch.long, device=device),
            distance=torch.full((size,), torch.nan, device=device),
            zero_gradient=torch.zeros(size, dtype=torch.bool, device=device),
            texts=tuple(variant.text for variant in self.best),
            histories=tuple(variant.history for variant in self.best),
            forced=tuple(tuple(self._forced(row, variant)) for row, variant in enumerate(self.best)),
            queries=self.queries.to(device),
        )

    def _padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids, mask = pad(prompts, "left")
        return ids.to(self.model.device), mask.to(self.model.device)

    def _losses(self, encoded: list[Encoded]) -> Tensor:
        ids, mask = self._padded([entry.prompt for entry in encoded])
        targets, target_mask = (t.to(ids.device) for t in pad([entry.target for entry in encoded], "right"))
        (log_probs,) = self.model.reply_log_probs(self.model.embed(ids), mask, Reply(targets, target_mask))
        return mean_cross_entropy(log_probs, target_mask).float().cpu()
