"""What attacks that rewrite whole prompts share: variants of a request, their target losses and the replies
they get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.batch import AdversarialBatch, pad
from lightning_modules.attacks.base import AttackedPrompt, require_texts
from lightning_modules.attacks.chunks import Chunked
from lightning_modules.attacks.ledger import CandidateLedger
from lightning_modules.attacks.suffix.slots import without_end_of_turn
from lightning_modules.attacks.text.variants import Variant
from lightning_modules.models.decoder import text_config
from lightning_modules.models.language_model import Encoded, LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.models.reply import Reply
from lightning_modules.models.requests import Decoding


@dataclass(frozen=True)
class Sendable:
    """A variant as ids: forced tokens are part of the prompt, `target` is what is left of the target after
    them."""

    prompt: list[int]
    target: list[int]


class TextSearch:
    """Requests and the best variant of each, during one attack. The model must be frozen meanwhile.

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
        # A model that states no limit (ALiBi, recurrent ones) gets one that no prompt reaches.
        self.limit = getattr(text_config(model.module), "max_position_embeddings", None) or 1 << 20
        mask = without_end_of_turn(batch.harmful_ids, batch.harmful_mask, self.chat.end_of_turn)
        self.targets = [ids[keep].tolist() for ids, keep in zip(batch.harmful_ids, mask, strict=True)]
        self.ledger = CandidateLedger(
            [Variant(prompt) for prompt in batch.prompts], lambda best: [variant.text for variant in best]
        )

    def encode(self, row: int, variant: Variant) -> Sendable | None:
        """The variant as ids, None where the template refuses its text or the model cannot take its
        length."""
        try:
            prompt = self.batch.envelope(row).prompt(self.chat, variant.text, variant.history).ids
        except ValueError:
            return None
        target, forced = self.targets[row], self._forced(row, variant)
        fits = len(prompt) + max(len(target), self.max_new_tokens) <= self.limit
        return Sendable(prompt + forced, target[len(forced) :]) if fits else None

    def _forced(self, row: int, variant: Variant) -> list[int]:
        """The target's first tokens that the variant forces; at least one is left to the model."""
        return self.targets[row][: min(variant.forced, len(self.targets[row]) - 1)]

    def losses(self, rows: Sequence[int], variants: Sequence[Variant]) -> Float[Tensor, " row"]:
        """Attacked loss of every variant (of what is not forced), inf where it cannot be sent."""
        encoded = [self.encode(row, variant) for row, variant in zip(rows, variants, strict=True)]
        usable = [i for i, entry in enumerate(encoded) if entry is not None]
        # Under bf16-true torch's default is bf16, and losses are fp32.
        found = torch.full((len(rows),), torch.inf, dtype=torch.float32)
        # Rows of like length share a batch, so that little of it is padding.
        usable.sort(key=lambda i: len(encoded[i].prompt))  # type: ignore[union-attr]
        if usable:
            with torch.no_grad():
                found[usable] = self.chunked(
                    lambda places: self._losses([encoded[i] for i in places.tolist()]), torch.tensor(usable)
                )  # type: ignore[misc]
        self.ledger.count_forward(torch.tensor([rows[i] for i in usable], dtype=torch.long))
        return found

    def replies(
        self, rows: Sequence[int], variants: Sequence[Variant], temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Replies, greedy at temperature 0, forced tokens included; '' where a variant cannot be sent."""
        encoded = [self.encode(row, variant) for row, variant in zip(rows, variants, strict=True)]
        usable = [i for i, entry in enumerate(encoded) if entry is not None]
        replies = [""] * len(rows)
        decoding = Decoding(self.max_new_tokens, temperature)
        for start in range(0, len(usable), self.chunked.max_rows):
            places = usable[start : start + self.chunked.max_rows]
            prompts = self._padded([encoded[i].prompt for i in places])  # type: ignore[union-attr]
            forced = tuple(tuple(self._forced(rows[i], variants[i])) for i in places)
            for place, reply in zip(
                places, self.model.reply(Encoded(*prompts, forced), decoding, seed + start), strict=True
            ):
                replies[place] = reply
        self.ledger.count_queries([rows[i] for i in usable])
        return replies

    def result(self) -> AttackedPrompt:
        """The best variants; a row of which none could be sent keeps its plain request.

        Raises: ValueError where not even that can be sent.
        """
        best = self.ledger.best
        encoded = [self.encode(row, variant) for row, variant in enumerate(best)]
        for row, entry in enumerate(encoded):
            if entry is None:
                raise ValueError(
                    f"the request {best[row].text[:60]!r} does not fit the model's {self.limit} "
                    "positions; set a shorter max_new_tokens"
                )
        return self.ledger.attacked(
            *self._padded([entry.prompt for entry in encoded if entry is not None]),
            texts=[variant.text for variant in best],
            histories=[variant.history for variant in best],
            forced=[tuple(self._forced(row, variant)) for row, variant in enumerate(best)],
        )

    def _padded(
        self, prompts: list[list[int]]
    ) -> tuple[Int[Tensor, "row prompt"], Bool[Tensor, "row prompt"]]:
        ids, mask = pad(prompts, "left")
        return ids.to(self.model.device), mask.to(self.model.device)

    def _losses(self, encoded: list[Sendable]) -> Float[Tensor, " row"]:
        ids, mask = self._padded([entry.prompt for entry in encoded])
        targets, target_mask = (t.to(ids.device) for t in pad([entry.target for entry in encoded], "right"))
        (log_probs,) = self.model.reply_log_probs(self.model.embed(ids), mask, Reply(targets, target_mask))
        return mean_cross_entropy(log_probs, target_mask).float().cpu()
