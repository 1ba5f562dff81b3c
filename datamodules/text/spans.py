"""A tokenised prompt and whose text each of its tokens carries, told by character spans."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

Attackable = Literal["user", "prompt", "data", "untrusted"]


def attackable_in(span: Attackable, document: bool) -> Attackable:
    """`untrusted` for a prompt with a document or without one: what comes from outside is the document, and
    the user's text only where there is none."""
    if span != "untrusted":
        return span
    return "data" if document else "user"


def writable(span: Attackable, text: str, document: str | None) -> str:
    """What an attack may write of a user's text and its document; without one there is nothing in `data`."""
    return (document or "") if attackable_in(span, document is not None) == "data" else text


class Role(IntEnum):
    """Whose text a prompt token carries. A token that merges two texts counts as the last one's here, so the
    user's before all."""

    TEMPLATE = 0
    HISTORY = 1
    """An earlier turn, the user's or the assistant's."""
    SYSTEM = 2
    USER = 3
    DATA = 4
    """A document inside the user's turn; a token that it shares with a mark is the template's."""


Span = tuple[int, int, Role]
"""Characters [start, end) of a rendered prompt, and whose they are."""


@dataclass(frozen=True)
class PromptTokens:
    """A tokenised prompt: ids and the role of every token."""

    ids: list[int]
    roles: list[Role]
    text: str
    system: str | None
    user_span: tuple[int, int]
    """Characters of `text` that are the (last) user's."""
    offsets: list[tuple[int, int]]
    """Characters of `text` behind every token."""
    reply_spans: tuple[tuple[int, int], ...] = ()
    """Characters of the earlier replies, each with its end of turn."""
    data: str | None = None
    """The document as it stands in `text`; None where there is none."""
    data_span: tuple[int, int] | None = None

    def attackable(self, span: Attackable) -> list[bool]:
        """True where an attack may act: the user's tokens, those of the document, those of the document or
        else the user's, or every prompt token as in the CAT authors' code."""
        span = attackable_in(span, self.data is not None)
        own = Role.DATA if span == "data" else Role.USER
        return [span == "prompt" or role is own for role in self.roles]

    def replied(self) -> list[bool]:
        """True on the tokens of earlier replies and their ends of turn: what a model had to generate."""
        return [
            any(start < right and max(end, start + 1) > left for left, right in self.reply_spans)
            for start, end in self.offsets
        ]


def placeholder(turn: int, whose: str) -> str:
    return f"Q{whose}text{turn}Q"


def stripped(shown: dict[str, tuple[str, Role]], strip: bool) -> dict[str, tuple[str, Role]]:
    return {name: (text.strip(), role) for name, (text, role) in shown.items()} if strip else shown


def fill(skeleton: str, shown: dict[str, tuple[str, Role]]) -> tuple[str, list[Span]]:
    """Replace the placeholders of a rendered skeleton once each, keeping the character spans of what was put
    in."""
    text, spans, rest = "", [], skeleton
    order = sorted((name for name in shown if name in skeleton), key=skeleton.index)
    for name in order:
        before, _, rest = rest.partition(name)
        start = len(text) + len(before)
        text += before + shown[name][0]
        spans.append((start, len(text), shown[name][1]))
    return text + rest, spans


def divided(spans: list[Span], user: int, mark: int, document: int) -> tuple[list[Span], tuple[int, int]]:
    """The user's span parted in instruction and document, by lengths in characters; the marks are nobody's.

    The whole begins and ends with no space that a template could strip, or else with a mark's.
    """
    (whole,) = (span for span in spans if span[2] is Role.USER)
    begin = whole[0] + user + mark
    data = begin, begin + document
    parts: list[Span] = [(whole[0], whole[0] + user, Role.USER), (*data, Role.DATA)]
    return [span for span in spans if span is not whole] + parts, data


def role_of(start: int, end: int, spans: list[Span]) -> Role:
    end = max(end, start + 1)
    overlapping = [
        role
        for left, right, role in spans
        if start < right and end > left and (role is not Role.DATA or (left <= start and end <= right))
    ]
    return max(overlapping, default=Role.TEMPLATE)
