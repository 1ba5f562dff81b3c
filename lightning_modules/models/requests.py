"""What a model is asked, and how its reply is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.fields import Count, NonNegative, Share, checked
from datamodules.text.chat_format import ChatFormat, PromptTokens, Turn


@dataclass(frozen=True)
class Request:
    """What is said to a model: an optional system message, earlier turns, the user's text with the document
    that belongs to it, and what its reply is made to begin with."""

    text: str
    system: str | None = None
    history: tuple[Turn, ...] = ()
    prefill: str = ""
    data: str | None = None
    """A document beside the text, trusted by nobody; None where there is none."""

    def tokens(self, chat: ChatFormat) -> PromptTokens:
        """The prompt as the model reads it, without the prefill. Raises: ValueError where it does not fit the
        chat template."""
        return chat.prompt(self.text, self.system, self.history, self.data)


@checked
@dataclass(frozen=True)
class Decoding:
    """How replies are generated."""

    max_new_tokens: Count = 64
    """Longest reply, what it was made to begin with aside."""
    temperature: NonNegative = 0.0
    """0 decodes greedily."""
    top_p: Share = 1.0
    """Nucleus of the sampling where the temperature is above 0."""
    max_rows: Count = 16
    """Requests per batch; prompts that come encoded are one batch already."""


GREEDY = Decoding()
