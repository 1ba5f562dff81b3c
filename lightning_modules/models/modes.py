"""A model's modes and the process's random state, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_modules.models.requests import Decoding


@contextmanager
def evaluating(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Every part in evaluation mode; each gets its own mode back."""
    training = [part for part in parts if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def seeded(decoding: Decoding, seed: int, device: torch.device) -> Iterator[None]:
    """A random state of its own for sampling; greedy decoding draws nothing."""
    if decoding.temperature == 0:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
