"""A chat model without weights."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_modules.models.requests import Request


class Echo:
    """A chat model that answers with a fixed text and remembers what it was asked."""

    name, revision = "echo", "r1"

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.asked: list[Request] = []

    def replies(self, conversations: Sequence[Request], seed: int = 0) -> list[str]:
        self.asked += conversations
        return [self.answer] * len(conversations)

    def clip(self, text: str, max_tokens: int) -> str:
        return " ".join(text.split()[:max_tokens])

    def escape(self, text: str) -> str:
        return text.replace("[/INST]", "[ /INST]")
