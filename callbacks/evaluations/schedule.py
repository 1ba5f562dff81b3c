"""When an evaluation runs inside `fit`, and on how many rows."""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.fields import Count, checked
from datamodules.result_lines import Stage


@checked
@dataclass(frozen=True)
class Schedule:
    """When an evaluation runs inside `fit`, and on how many rows of every subject (evenly spaced ones)."""

    every_n_steps: Count | None = None
    """Evaluate after every so many optimiser steps; null for no periodic evaluation."""
    at_start: bool = False
    """Evaluate before the first training step."""
    at_end: bool = True
    """Evaluate after the last training step, also where training was stopped early."""
    limit: Count | None = None
    """Use at most so many rows inside `fit`; null uses all."""
    test_limit: Count | None = None
    """The same for `validate` and `test`."""

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after an optimiser step; `last` is the one that training ends with."""
        periodic = self.every_n_steps is not None and step % self.every_n_steps == 0
        return periodic or (self.at_end and step == last)

    def rows(self, stage: Stage) -> int | None:
        """The limit in force."""
        return self.limit if stage == "fit" else self.test_limit
