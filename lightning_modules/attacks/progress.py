"""Lets somebody watch an attack at work (a progress bar, the live view of `thundercat attack`) without the
attack knowing whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxtyping import Float
from torch import Tensor

Observer = Callable[[Float[Tensor, " batch"], Callable[[], list[str]]], None]
"""Called after every iterate with the attacked losses (NaN where a behaviour is done) and a function that
gives the best texts."""

_observer: ContextVar[Observer | None] = ContextVar("attack_observer", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call `observer` after every iterate of the attacks that run inside."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def notify(losses: Float[Tensor, " batch"], texts: Callable[[], list[str]] = list) -> None:
    """Tell the observer, if there is one."""
    observer = _observer.get()
    if observer is not None:
        observer(losses, texts)
