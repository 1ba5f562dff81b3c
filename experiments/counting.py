"""Progress of long work whose items take minutes: a bar on a terminal, a line per item in a log file."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from callbacks.progress import on_terminal


def counter(total: int, what: str, unit: str, done: int = 0) -> tqdm[Any] | Lines:
    """Counts items, as a context; on a terminal as a bar.

    Args:
        total: items in all.
        what: the work.
        unit: what an item is.
        done: items that were finished before.
    """
    if on_terminal():
        return tqdm(total=total, initial=done, desc=what, unit=unit, file=sys.stderr, smoothing=0)
    return Lines(total, what, unit, done)


@dataclass
class Lines:
    """One line for every item that ends, with the time left by the mean of those of this process."""

    total: int
    what: str
    unit: str
    done: int
    _before: int = field(init=False)
    _began: float = field(init=False, default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        self._before = self.done

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        """A log needs no end."""

    def set_postfix_str(self, text: str) -> None:
        """What begins now."""
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)

    def update(self) -> None:
        """One more has ended."""
        self.done += 1
        each = (time.monotonic() - self._began) / (self.done - self._before)
        rest = self.total - self.done
        left = f", {tqdm.format_interval(each * rest)} left" if rest else ""
        print(f"{self.what}: {self.done} of {self.total} {self.unit}s{left}", file=sys.stderr, flush=True)
