"""Processes tell each other what they are about to do together.

Collectives meet by their order alone: a process that makes one pass more than another would wait for it
without end, or take another collective's numbers for its own. A few bytes beforehand make that an error.
"""

from __future__ import annotations

import hashlib

import torch
from torch import distributed


class Agreement:
    """All processes build it together, and call it together ever after; one process alone always agrees.

    What is said goes between the hosts, in a group of its own: it meets no other collective and waits for no
    GPU.
    """

    def __init__(self) -> None:
        several = distributed.is_available() and distributed.is_initialized()
        self._world = distributed.get_world_size() if several else 1
        self._group = distributed.new_group(backend="gloo") if self._world > 1 else None

    def __call__(self, doing: str) -> None:
        """Say what this process does next. Raises: ValueError, in all processes, where one does another
        thing."""
        if self._group is None:
            return
        digest = hashlib.blake2b(doing.encode(), digest_size=8).digest()
        own = torch.tensor([int.from_bytes(digest, "big", signed=True)])
        said = [torch.empty_like(own) for _ in range(self._world)]
        distributed.all_gather(said, own, group=self._group)
        if all(torch.equal(other, own) for other in said):
            return
        names = [""] * self._world
        distributed.all_gather_object(names, doing, group=self._group)
        other = next(rank for rank, name in enumerate(names) if name != names[0])
        raise ValueError(
            f"trainer.devices: expected {self._world} processes that do the same, got {names[0]!r} from "
            f"process 0 and {names[other]!r} from process {other}; which rows there are, and what a term of "
            "the loss does to the model, must not depend on the process: mend it, or set trainer.devices: 1"
        )
