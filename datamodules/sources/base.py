"""What a data source is: something that yields rows, or named problems (`file:line`); the policy for problems
is the data module's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from datamodules.rows import ChatRow, HarmfulRow, RowProblem

DEFAULT_SAFE_REPLY = "I'm sorry, but I can't help with that."


class HarmfulSource(Protocol):
    """Yields harmful requests with targets and safe replies."""

    def rows(self) -> Iterator[HarmfulRow | RowProblem]: ...


class ChatSource(Protocol):
    """Yields harmless requests with replies."""

    def rows(self) -> Iterator[ChatRow | RowProblem]: ...


@runtime_checkable
class Collected(Protocol):
    """A source whose rows a model was attacked for, or wrote: what that took belongs to the cost of
    training."""

    @property
    def collecting_passes(self) -> int:
        """Forward and backward passes of single examples. A generated reply is one: with a cache each of its
        positions goes through the model once."""
        ...


def collecting_passes(sources: Iterable[object]) -> int:
    """Of those sources that are `Collected`."""
    return sum(own.collecting_passes for own in sources if isinstance(own, Collected))
