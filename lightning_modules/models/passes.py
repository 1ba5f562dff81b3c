"""Counting forward and backward passes of single examples where they happen: at the model.

    with PassCounter() as passes:
        loss = ...          # whatever models are scored: the policy, a reference, a teacher
    loss.backward()
    passes.total

The unit is the CAT paper's (arXiv 2405.15589, table 1): one forward or one backward of one example with one
reply. Two replies that share a prompt's forward pass count as two, so that sharing is a gain in time, not in
the books.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from torch import Tensor

_open: list[PassCounter] = []


class PassCounter:
    """Counts what is scored while it is open; counters may be nested, and each counts.

    A backward pass is counted when a gradient flows back into the scored states, also after the context has
    been left: a graph that nobody differentiates costs none.
    """

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __enter__(self) -> Self:
        _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # By identity, from the end: the same counter may be open twice.
        index = max(i for i, counter in enumerate(_open) if counter is self)
        del _open[index]


def count_passes(states: Tensor, examples: int) -> None:
    """Tell all open counters of a forward pass of so many examples, and of its backward pass once there is
    one."""
    count_forward(examples)
    count_backward(states, examples)


def count_forward(examples: int) -> None:
    """Tell all open counters of a forward pass of so many examples."""
    for counter in _open:
        counter.forward += examples


def count_backward(states: Tensor, examples: int) -> None:
    """Tell the counters that are open now once a gradient has flowed back into these states."""
    if not _open or not states.requires_grad:
        return
    counters = tuple(_open)

    def flowed(gradient: Tensor) -> None:
        for counter in counters:
            counter.backward += examples

    states.register_hook(flowed)
