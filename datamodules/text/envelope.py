"""What a text that an attack writes is sent in: the conversation around it, which the attacker does not
write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.rows import Turn
from datamodules.text.chat_format import ChatFormat
from datamodules.text.spans import PromptTokens, Role


@dataclass(frozen=True)
class Envelope:
    """The text is a user's, before a document if there is one; or, with an instruction, it is the
    document."""

    system: str | None = None
    instruction: str | None = None
    document: str | None = None

    def prompt(self, chat: ChatFormat, text: str, history: Sequence[Turn] = ()) -> PromptTokens:
        """The whole prompt with this text. Raises: ValueError as `ChatFormat.prompt` does."""
        if self.instruction is not None:
            return chat.prompt(self.instruction, self.system, history, text)
        return chat.prompt(text, self.system, history, self.document)

    @property
    def role(self) -> Role:
        """Whose the text is."""
        return Role.USER if self.instruction is None else Role.DATA

    def span(self, tokens: PromptTokens) -> tuple[int, int]:
        """The text's characters in a rendered prompt."""
        if self.instruction is None:
            return tokens.user_span
        assert tokens.data_span is not None, "an instruction comes with a document"
        return tokens.data_span

    def keeps(self, chat: ChatFormat, text: str) -> bool:
        """Whether the text is sent as it is: one that could end its part of the prompt is not."""
        if self.instruction is None:
            return True
        try:
            return chat.as_data(text) == text
        except ValueError:
            return False
