"""Sources made of other sources: harmful requests as conversations, rows several times over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from datamodules.fields import Count, checked
from datamodules.rows import ChatRow, RowProblem
from datamodules.sources.base import ChatSource, HarmfulSource


@checked
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


@checked
class Repeated:
    """A source's rows several times over, to weigh it against others in the same stream.

    Args:
        source: the conversations.
        times: how often each row occurs; from the second time on its key ends in `#2`, `#3`, ...
    """

    def __init__(self, source: ChatSource, times: Count) -> None:
        self.source = source
        self.times = times

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in self.source.rows():
            yield row
            # A problem is one problem however often its row would have occurred.
            if not isinstance(row, RowProblem):
                yield from (replace(row, key=f"{row.key}#{i}") for i in range(2, self.times + 1))
