"""Whether a part of a model computes what a known one does: most families' are copies of Llama's."""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any

from torch import nn


def says(function: Callable[..., Any]) -> tuple[object, ...] | None:
    """What a function does, wherever it stands and whatever is wrapped around it; None where it cannot be
    read."""
    code = getattr(unwrap(function), "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_varnames, code.co_consts)


def is_copy_of(part: nn.Module, known: tuple[object, ...] | None) -> bool:
    """Whether its forward pass does this. What computes something else, or a kernel put in its place, is
    none."""
    return known is not None and "forward" not in vars(part) and says(type(part).forward) == known
