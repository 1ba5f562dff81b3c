"""Sources made of other sources: harmful requests as conversations, rows several times over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from datamodules.rows import ChatRow, RowProblem
from datamodules.sources.base import ChatSource, HarmfulSource


class AnsweredRequests:
    """Harmful requests as conversations, for supervised stages.

    Args:
        source: the harmful requests.
        reply: `target` teaches compliance (a helpful-only stage), `safe` teaches refusal.
    """

    def __init__(self, source: HarmfulSource, reply: Literal["target", "safe"]) -> None:
        self.source = source
        self.reply = reply

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in self.source.rows():
            if isinstance(row, RowProblem):
                yield row
            else:
                answer = row.target if self.reply == "target" else row.safe_reply
                yield ChatRow(
                    f"{row.key}/{self.reply}", row.prompt, answer, row.where, row.category, row.system
                )


class Repeated:
    """A source's rows several times over, to weigh it against others in the same stream.

    Args:
        source: the conversations.
        times: how often each row occurs.
    """

    def __init__(self, source: ChatSource, times: int) -> None:
        if times < 1:
            raise ValueError(f"Repeated.times: expected >= 1, got {times}; leave the source out instead")
        self.source = source
        self.times = times

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in list(self.source.rows()):
            # A problem is one problem however often its row would have occurred.
            yield from [row] * (1 if isinstance(row, RowProblem) else self.times)
