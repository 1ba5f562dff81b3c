"""What a learned filter judges: a conversation as the model sees it, up to the last request or with the reply
to it."""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.rows import ChatRow, HarmfulRow, Row
from datamodules.text.chat_format import ChatFormat, PromptTokens
from lightning_modules.models.requests import Request


@dataclass(frozen=True)
class Exchange:
    """A request with all that stands before and beside it, and what was replied to it."""

    request: Request
    reply: str | None = None
    """None where the request is judged; never blank."""

    def ids(self, chat: ChatFormat) -> tuple[list[int], list[int]]:
        """Tokens of the prompt and of the reply, which is empty where there is none; without its end of turn:
        a reply that was cut off has none."""
        prompt = self.request.tokens(chat)
        return prompt.ids, [] if self.reply is None else _continued(chat, prompt, self.reply)

    @property
    def text(self) -> str:
        """For classifiers that know no chat: earlier turns, the user's text, the document and the reply, a
        blank line apart. The system message is nobody's harm."""
        own = self.request
        earlier = [text for turn in own.history for text in turn]
        return "\n\n".join(
            [*earlier, *(text for text in (own.text, own.data, self.reply) if text is not None)]
        )


def request_of(row: Row) -> Request:
    """What a row asks, with its system message, earlier turns and document."""
    history = row.history if isinstance(row, ChatRow) else ()
    return Request(row.prompt, row.system, history, data=row.data)


def replied(row: HarmfulRow | ChatRow, reply: str) -> Exchange:
    """A row's request with one of its replies. Raises: ValueError naming a row that has none."""
    if not reply.strip():
        raise ValueError(f"{row.where}: expected a reply, which a filter of replies learns from, got none")
    return Exchange(request_of(row), reply)


def _continued(chat: ChatFormat, prompt: PromptTokens, reply: str) -> list[int]:
    # No tokenizer takes half a surrogate pair.
    text, end = chat.neutralised(reply.encode(errors="replace").decode()), chat.end_of_turn
    try:
        ids = chat.reply(prompt, text)
    except ValueError:
        # Not what any model of this template generates: judged nevertheless, as its own tokens.
        return chat.encode_batch([text])[0]
    return ids[: -len(end)] if end and ids[-len(end) :] == end else ids
