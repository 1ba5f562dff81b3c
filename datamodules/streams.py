"""Which rows form which micro-batch: a pure function of (seed, step), so that a run resumes bit-exactly
anywhere.

Each stream is the concatenation of seeded permutations of its rows (one per pass over the data), cut into
windows of a fixed number of optimiser steps. Within a window the rows are sorted by length and cut into
steps, whose order is then shuffled: rows of like length meet, and every row still occurs once per pass. How a
step's rows are divided (division.py) changes none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from datamodules.division import Division

ATTACKED = "attacked"
"""Name of harmful rows that are attacked now, for this micro-batch and for following ones."""

Item = tuple[str, int]


class Stream:
    """A seeded, endless, length-bucketed order of rows in batches of fixed size, one for each optimiser step.

    Args:
        lengths: length of every row, in tokens.
        batch_size: rows per step, over all ranks.
        seed: seed of the order.
        window: steps sorted by length together; 1 switches bucketing off.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, window: int = 8
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.window = window
        # One stream reads its windows and passes in order, so a short memory is enough.
        self._pass_order = lru_cache(maxsize=4)(self._permutation)
        self._window_order = lru_cache(maxsize=2)(self._bucketed)

    def batch(self, number: int) -> list[int]:
        """Row indices of the step with this absolute number, the shortest first."""
        window, place = divmod(number, self.window)
        return [int(row) for row in self._window_order(window)[place]]

    def _permutation(self, number: int) -> np.ndarray:
        # The 0 here and the 1 below keep passes and windows of one number from drawing alike.
        return np.random.default_rng([self.seed, 0, number]).permutation(len(self.lengths))

    def _bucketed(self, number: int) -> np.ndarray:
        size = self.window * self.batch_size
        positions = np.arange(number * size, (number + 1) * size)
        passes, places = np.divmod(positions, len(self.lengths))
        rows = np.array([self._pass_order(int(p))[place] for p, place in zip(passes, places, strict=True)])
        # Stable: where lengths are equal, numpy's default order depends on the processor.
        ordered = rows[np.argsort(self.lengths[rows], kind="stable")].reshape(self.window, self.batch_size)
        shuffled: np.ndarray = np.random.default_rng([self.seed, 1, number]).permutation(ordered)
        return shuffled


class StepSampler(Sampler[list[Item]]):
    """Yields micro-batches as lists of (stream name, row index), starting where training stands.

    Args:
        streams: the streams by name.
        division: how each step's rows are divided.
        length: micro-batches per epoch.
        position: returns the absolute number of the next micro-batch, read each time iteration starts.
        rank: number of this process; rows are dealt out in turn.
        world_size: number of processes.
    """

    def __init__(
        self,
        streams: dict[str, Stream],
        division: Division,
        length: int,
        position: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.streams = streams
        self.division = division
        self.length = length
        self.position = position
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[Item]]:
        # A run that resumes within an epoch has only the rest of it left.
        start = self.position()
        for number in range(start, start - start % self.length + self.length):
            step, place = divmod(number, self.division.micro_batches)
            yield [item for name in self.streams for item in self._items(name, step, place)]

    def _items(self, name: str, step: int, place: int) -> Iterator[Item]:
        """A stream's rows in one micro-batch of this process, before them those to be attacked with them."""
        part = self.division.part(name, place)
        if part is None:
            return
        # In turn and not in blocks: the rows stand by length, and all processes wait for the slowest.
        own = self.streams[name].batch(step)[self.rank :: self.world_size]
        size = self.division.rows(name) // self.world_size
        begin = part * size
        if name == "harmful" and self.division.begins_attack(part):
            attacked = own[begin : begin + self.division.attacked // self.world_size]
            yield from ((ATTACKED, row) for row in attacked)
        yield from ((name, row) for row in own[begin : begin + size])
