"""Evaluate many rows in chunks whose size is learned from out-of-memory errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Chunked:
    """Calls a function on slices of its arguments and joins the results.

    Args:
        max_rows: rows per call to start with; halved, and remembered, whenever the device runs out of memory.
            None takes 64 on a CPU, where larger batches leave its caches (measured: 512 are 1.5 times
            slower), and 512 elsewhere.
        device: where the rows are computed.
    """

    def __init__(self, max_rows: int | None = None, device: torch.device | None = None) -> None:
        self.max_rows = max_rows or (64 if device is None or device.type == "cpu" else 512)

    def __call__(self, function: Callable[..., Tensor], *arguments: Tensor | Sequence[Any]) -> Tensor:
        """function(*arguments) row by row; all arguments share their first dimension or length.

        Raises: torch.OutOfMemoryError if a single row does not fit.
        """
        parts: list[Tensor] = []
        done, total = 0, len(arguments[0])
        while done < total:
            chunk = [argument[done : done + self.max_rows] for argument in arguments]
            try:
                parts.append(function(*chunk))
            except torch.OutOfMemoryError:
                if self.max_rows == 1:
                    raise
                self.max_rows //= 2
                # What the failed pass left is cut to its own sizes, which smaller passes could not use.
                torch.cuda.empty_cache()
                log.warning("out of memory: candidates are evaluated %d at a time from now on", self.max_rows)
                continue
            done += len(chunk[0])
        return torch.cat(parts)
