"""A checkpoint's tensors that lie in pieces on several devices: written and read by all of them at once.

A folder of safetensors files, one per process, by torch.distributed.checkpoint: nothing in it can run code,
and any number of processes reads it, each what it needs. What is no tensor, and single numbers, stay in the
checkpoint's own file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"
"""Where Lightning's checkpoints hold tensors of the model's size."""
TIED = "tied_weights"
"""In a taken apart checkpoint: names of a weight that has another one too, under which it is written."""


def take_apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint without its larger tensors, and those by names of their own."""
    rest, tensors, tied = dict(checkpoint), {}, {}
    first: dict[int, str] = {}
    for name, weight in rest.pop(WEIGHTS).items():
        if first.setdefault(id(weight), name) == name:
            tensors[f"{WEIGHTS}.{name}"] = weight.detach()
        else:
            tied[name] = first[id(weight)]
    rest[TIED] = tied
    if OPTIMIZERS in rest:
        rest[OPTIMIZERS] = [
            {**own, "state": {key: dict(state) for key, state in own["state"].items()}}
            for own in rest[OPTIMIZERS]
        ]
        for i, own in enumerate(rest[OPTIMIZERS]):
            for key, state in own["state"].items():
                for part in [
                    part for part, value in state.items() if isinstance(value, Tensor) and value.ndim
                ]:
                    tensors[f"{OPTIMIZERS}.{i}.{key}.{part}"] = state.pop(part)
    return rest, tensors


def put_together(rest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The reverse of `take_apart`."""
    checkpoint = {key: value for key, value in rest.items() if key != TIED}
    prefix = f"{WEIGHTS}."
    weights = {name.removeprefix(prefix): own for name, own in tensors.items() if name.startswith(prefix)}
    checkpoint[WEIGHTS] = weights | {name: weights[other] for name, other in rest[TIED].items()}
    if OPTIMIZERS in rest:
        checkpoint[OPTIMIZERS] = [
            {**own, "state": {key: dict(state) for key, state in own["state"].items()}}
            for own in rest[OPTIMIZERS]
        ]
        for name, tensor in tensors.items():
            if name.startswith(f"{OPTIMIZERS}."):
                _, i, key, part = name.split(".", 3)
                checkpoint[OPTIMIZERS][int(i)]["state"][int(key)][part] = tensor
    return checkpoint


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the pieces that are here; all processes call it together."""
    save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Everything in the folder, put together on the CPU of this process."""
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in _sizes(folder).items()}
    _read(tensors, folder, together=False)
    return tensors


def read_shards(
    folder: Path, model: torch.nn.Module, optimizers: Iterable[Optimizer], rest: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill a sharded model and its optimisers in place; all processes call it together.

    Weights that are not there, or of another shape, are left as they are: whoever checks the checkpoint
    against the model finds them by their shapes in what is returned, which holds no weight itself.
    """
    known, own = _sizes(folder), model.state_dict(keep_vars=True)
    weights = {f"{WEIGHTS}.{name}": value for name, value in own.items()}
    asked = {name: w for name, w in weights.items() if name in known and known[name][0] == w.shape}
    templates: dict[str, Tensor] = {}
    for i, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name, (size, dtype) in known.items():
            if name.startswith(f"{OPTIMIZERS}.{i}."):
                like = parameters[int(name.split(".", 3)[2])]
                templates[name] = (
                    torch.zeros_like(like, dtype=dtype)
                    if like.shape == size
                    else torch.empty(size, dtype=dtype)
                )
    _read({**{name: w.detach() for name, w in asked.items()}, **templates}, folder, together=True)
    shapes = {
        name: torch.empty(size, device="meta")
        for name, (size, _) in known.items()
        if name.startswith(WEIGHTS)
    }
    filled = put_together(rest, {**shapes, **templates})
    for optimizer, state in zip(optimizers, filled.get(OPTIMIZERS, []), strict=False):
        optimizer.load_state_dict(state)
    return filled


def _sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Whole shape and dtype of every tensor."""
    known: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (own.size, own.properties.dtype) for name, own in known.items()}


def _read(tensors: dict[str, Tensor], folder: Path, together: bool) -> None:
    """Fill tensors, whole or in pieces, in place; alone, or as all processes together."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not together)
