"""A checkpoint of a sharded model: the file as ever, and beside it a folder with the large tensors' pieces.

    step_000010.ckpt               the record: steps, schedules, digest, the pieces' names and digests
    step_000010.1a2b3c4d.pieces/   safetensors, one file per process; named by what they hold

The record is written last: it names whole pieces only, and where there is none there is no checkpoint.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, distributed

from lightning_modules.models.shard_files import put_together, read_whole, write_shards

PIECES = "pieces"
"""In a checkpoint: the folder's name and its files' digests."""
SUFFIX = ".pieces"


def pieces_beside(path: Path) -> Iterator[Path]:
    """The folders that were written for a checkpoint of this name, whether a record names them or not."""
    yield from path.parent.glob(f"{path.stem}.*{SUFFIX}")


def write_pieces(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Write a checkpoint's pieces, each process its own; all call it together. Returns what the record says
    of them. The folder is named by what it holds: an earlier one of the same step stays whole, for the record
    that names it.

    Raises: OSError where the disk is full or the folder cannot be written.
    """
    partial, first = path.with_suffix(f"{SUFFIX}.partial"), distributed.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    distributed.barrier()
    write_shards(tensors, partial)
    distributed.barrier()
    own = sorted(partial.iterdir())[distributed.get_rank() :: distributed.get_world_size()]
    found: list[dict[str, str]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(found, {file.name: digest_of(file) for file in own})
    files = dict(sorted(item for some in found for item in some.items()))
    name = hashlib.blake2b(repr(files).encode(), digest_size=4).hexdigest()
    folder = path.with_suffix(f".{name}{SUFFIX}")
    said = {"folder": folder.name, "files": files}
    if first:
        if (
            folder.exists() and damage({PIECES: said}, path) is None
        ):  # the same pieces, which a record may name
            shutil.rmtree(partial)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    return said


def damage(record: Mapping[str, Any], path: Path) -> str | None:
    """What is wrong with a checkpoint's pieces, None for nothing. The record is verified already."""
    folder = path.parent / record[PIECES]["folder"]
    for name, digest in record[PIECES]["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if digest_of(file) != digest:
            return f"{file} is not what was written"
    return None


def whole(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The checkpoint as one process would have written it."""
    rest = {key: value for key, value in record.items() if key != PIECES}
    return put_together(rest, read_whole(path.parent / record[PIECES]["folder"]))


def digest_of(file: Path) -> str:
    """Of the file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
