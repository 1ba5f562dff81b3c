"""What processes tell each other of an attack's state: what each has found, and in one checkpoint what each
has, of which it takes its own back."""

from __future__ import annotations

import itertools
import logging
from typing import Any, TypeVar, cast

from torch import Tensor, distributed

log = logging.getLogger(__name__)
T = TypeVar("T")


def exchanged(own: list[T]) -> list[T]:
    """What all processes have found, in the order in which one process would have found it: a step's rows are
    dealt out in turn. Every process must call this at the same time."""
    world = process()[1]
    if world == 1:
        return own
    found: list[list[T]] = [[] for _ in range(world)]
    distributed.all_gather_object(found, own)
    absent = object()
    turns = itertools.zip_longest(*found, fillvalue=absent)
    return [cast(T, item) for turn in turns for item in turn if item is not absent]


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """The states of all processes, in the first process, which writes the checkpoint; the others' lists stay
    empty. Every process must call this at the same time.

    Tensors go to the CPU: a state of another process's GPU could not be held here.
    """
    own, (rank, world) = _on_cpu(state), process()
    if world == 1:
        return {"ranks": [own]}
    states: list[Any] | None = [None] * world if rank == 0 else None
    distributed.gather_object(own, states)
    return {"ranks": states or []}


def own_states(state: dict[str, Any], owner: object) -> list[dict[str, Any]]:
    """This process's state out of what `gathered` wrote; all of them where the number of processes has
    changed, which is said aloud, since such a run cannot go on as it would have.

    Raises: ValueError where the checkpoint holds no process's state.
    """
    states = cast("list[dict[str, Any]]", state.get("ranks") or [])
    if not states:
        raise ValueError(
            f"expected the state of {type(owner).__name__} in the checkpoint, got none; resume from a "
            "checkpoint that this version's first process wrote"
        )
    rank, world = process()
    if world == len(states):
        return [states[rank]]
    name = type(owner).__name__
    log.warning("%s: the checkpoint is of %d processes, this run has %d", name, len(states), world)
    return states


def process() -> tuple[int, int]:
    """Number of this process and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _on_cpu(state: Any) -> Any:
    """The same nest of dicts, lists and tuples with every tensor on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_on_cpu(item) for item in state)
    return state
