"""Sources made of other sources: harmful requests as conversations, conversations whose harm is a refusal,
rows several times over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from datamodules.fields import Count, checked
from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.sources.base import ChatSource, HarmfulSource, collecting_passes


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

    @property
    def collecting_passes(self) -> int:
        return collecting_passes([self.source])

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in self.source.rows():
            if isinstance(row, RowProblem):
                yield row
            else:
                answer = row.target if self.reply == "target" else row.safe_reply
                yield ChatRow(
                    f"{row.key}/{self.reply}",
                    row.prompt,
                    answer,
                    row.where,
                    row.category,
                    row.system,
                    data=row.data,
                )


@checked
class RefusalsAsHarm:
    """Benign conversations as adversarial examples in which refusing is the harm: the attack aims at a
    refusal, the safe reply is the right answer.

    Beside harmful requests in the same stream they keep "attacked" from becoming a reason to refuse: the
    perturbation is on both kinds, and only what is asked tells them apart.

    Args:
        source: the conversations; they must have a reply.
        refusals: what the attack aims at, in turn.
    """

    def __init__(self, source: ChatSource, refusals: list[str]) -> None:
        if not refusals or not all(text.strip() for text in refusals):
            raise ValueError(
                f"RefusalsAsHarm.refusals: expected at least one text, none empty, got {refusals}"
            )
        self.source = source
        self.refusals = refusals

    @property
    def collecting_passes(self) -> int:
        return collecting_passes([self.source])

    def rows(self) -> Iterator[HarmfulRow | RowProblem]:
        for number, row in enumerate(self.source.rows()):
            if isinstance(row, RowProblem) or row.history:
                yield row if isinstance(row, RowProblem) else RowProblem(row.where, "has earlier turns")
                continue
            yield HarmfulRow(
                key=f"{row.key}/refused",
                prompt=row.prompt,
                target=self.refusals[number % len(self.refusals)],
                safe_reply=row.reply,
                where=row.where,
                category=row.category,
                system=row.system,
                data=row.data,
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

    @property
    def collecting_passes(self) -> int:
        return collecting_passes([self.source])

    def rows(self) -> Iterator[ChatRow | RowProblem]:
        for row in self.source.rows():
            yield row
            # A problem is one problem however often its row would have occurred.
            if not isinstance(row, RowProblem):
                yield from (replace(row, key=f"{row.key}#{i}") for i in range(2, self.times + 1))
