"""Self-reminder (Xie et al. 2023, Nature Machine Intelligence 5:1486) and safety system prompts: words around
the request that tell the model to be careful."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from datamodules.fields import checked
from lightning_modules.defences.base import Answer, spent
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding, Request


@checked
class Reminder:
    """The same model, asked in other words.

    Args:
        before: text before every request.
        after: text after it.
        system: system message of every conversation; it stands before the conversation's own. Null adds none.

    Raises: ValueError where all three are empty.
    """

    name = "reminder"

    def __init__(self, before: str = "", after: str = "", system: str | None = None) -> None:
        if not (before or after or system):
            raise ValueError("Reminder: expected before, after or system, got none; set one of them")
        self.before = before
        self.after = after
        self.system = system

    def answers(
        self, model: LanguageModel, requests: Sequence[Request], decoding: Decoding, seed: int
    ) -> list[Answer]:
        """The model's reply to the reminded request; costs the reminder's tokens."""
        sent = [self.reminded(request) for request in requests]
        replies = model.reply(sent, decoding, seed)
        return [
            Answer(reply, 1, tokens)
            for reply, tokens in zip(replies, spent(model, sent, replies), strict=True)
        ]

    def seen_through(
        self, model: LanguageModel, requests: Sequence[Request], draws: int, seed: int
    ) -> list[list[Request]]:
        """The reminded request; nothing is random."""
        return [[self.reminded(request)] for request in requests]

    def excesses(
        self, model: LanguageModel, requests: Sequence[Request], replies: Sequence[str]
    ) -> list[float] | None:
        """None: nothing is stopped."""
        return None

    def reminded(self, request: Request) -> Request:
        """The request between the reminder's texts."""
        system = request.system
        if self.system is not None:
            system = self.system if not system else f"{self.system}\n{system}"
        return replace(request, text=self.before + request.text + self.after, system=system)
