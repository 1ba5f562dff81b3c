"""A checkpoint as a file: whole or not there, verified, and never executed.

It is written beside its target, flushed and renamed: whatever ends the process, the file under the final name
is complete. It holds a digest of its content, so that a damaged file is noticed, and the configuration that
decided its weights.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException

from callbacks.run_folder.checkpoint_pieces import PIECES, damage, pieces_beside, whole, write_pieces
from callbacks.run_folder.decisive import Flat
from callbacks.run_folder.folder import RunError

DIGEST, CONFIGURATION = "content_digest", "decisive_configuration"


class DamagedCheckpoint(RunError):
    """A file that is no complete checkpoint."""


class RunCheckpointIO(CheckpointIO):
    """How every checkpoint of a run is written and read, those of Lightning's own ModelCheckpoint too.

    Args:
        configuration: the fields that decide the weights (`decisive`); null where none are known.
    """

    def __init__(self, configuration: Flat | None = None) -> None:
        self.configuration = configuration
        self._proven = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write, flush, rename; the first one of a process is read back before it gets its name.

        Raises: RunError where the disk is full, the folder cannot be written, or what a callback or module
            keeps could not be read again.
        """
        content = {**checkpoint, CONFIGURATION: self.configuration}
        content[DIGEST] = digest(content)
        target = Path(path)
        partial = target.with_name(f"{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                torch.save(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
            if not self._proven:
                _prove(partial, target, content)
                self._proven = True
            partial.replace(target)
            flush_folder(target.parent)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write as a RuntimeError of its own.
            partial.unlink(missing_ok=True)
            raise _unwritten(target, error) from error

    def save_pieces(self, rest: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
        """The same of a sharded model, whose processes call it together. Raises: RunError as above."""
        try:
            pieces = write_pieces(tensors, path)
        except (OSError, CheckpointException) as error:
            raise _unwritten(path, error) from error
        if distributed.get_rank() == 0:
            self.save_checkpoint({**rest, PIECES: pieces}, path)
            remove_unnamed(path)

    def load_pieces(self, path: Path) -> tuple[dict[str, Any], Path | None]:
        """What the file holds, verified, and the folder of the pieces; None where it holds everything.

        Raises: RunError, DamagedCheckpoint.
        """
        record = read_record(path)
        pieces = record.pop(PIECES, None)
        return record, None if pieces is None else path.parent / pieces["folder"]

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Raises: DamagedCheckpoint."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def remove(path: Path) -> None:
    """A checkpoint, with its pieces where it has some that nothing else names."""
    path.unlink(missing_ok=True)
    remove_unnamed(path)


def remove_unnamed(path: Path) -> None:
    """Pieces of a checkpoint of this name that no record names, its own or one that is set aside: of a record
    that was replaced, or of a kill before it was written."""
    folders = list(pieces_beside(path))
    if not folders:
        return
    named = set()
    for record in path.parent.glob(f"{path.stem}.*"):
        if record.is_file() and not record.name.endswith(".partial"):
            try:
                named.add(load_file(record).get(PIECES, {}).get("folder"))
            except DamagedCheckpoint:
                return  # it might name any of them
    for folder in folders:
        if folder.name not in named:
            shutil.rmtree(folder, ignore_errors=True)


def _unwritten(target: Path, error: BaseException) -> RunError:
    return RunError(
        f"{target}: cannot write the checkpoint ({_cause(error)}); earlier ones are kept: make room, then "
        "resume with --ckpt_path last"
    )


def _prove(partial: Path, target: Path, content: dict[str, Any]) -> None:
    """Raises: RunError naming what in a checkpoint cannot be read again; a training must not find that out
    when it resumes."""
    try:
        read_record(partial)
    except DamagedCheckpoint as error:
        partial.unlink()
        found = next(unreadable("", content), None)
        if found is None:
            raise
        raise RunError(
            f"{target}: {found[0]} holds a {found[1]}, which no checkpoint can give back without running "
            "code; keep numbers, texts, tensors, or lists and mappings of them in state_dict()"
        ) from error


def unreadable(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Place and type of everything that `weights_only` does not load."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from unreadable(path, key)
            yield from unreadable(f"{path}.{key}".strip("."), item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from unreadable(path, item)
    elif not isinstance(value, torch.Tensor):
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except Exception:  # each kind of object fails in its own way
            yield path, type(value).__name__


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, verified, with pieces put together; nothing in it is executed.

    Raises: RunError where there is no file, DamagedCheckpoint where it is not what was written.
    """
    record = read_record(path)
    return whole(record, Path(path)) if PIECES in record else record


def read_record(path: str | Path) -> dict[str, Any]:
    """The same of the file alone; of pieces beside it what it says of them, which is verified too.

    Raises: RunError, DamagedCheckpoint.
    """
    content = load_file(Path(path))
    stored = content.pop(DIGEST, None)
    if stored is None:
        raise DamagedCheckpoint(f"{path}: no checkpoint of a run (it has no digest)")
    if stored != digest(content):
        raise DamagedCheckpoint(f"{path}: damaged (its content is not what was written)")
    found = damage(content, Path(path)) if PIECES in content else None
    if found is not None:
        raise DamagedCheckpoint(f"{path}: damaged ({found})")
    return content


def load_file(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's content, not verified. Raises: RunError without the file, DamagedCheckpoint where it
    cannot be read."""
    if not path.is_file():
        raise RunError(f"ckpt_path: no file {str(path)!r}; give a checkpoint of this run, or `last`")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file can end in any of the unpickler's errors
        raise DamagedCheckpoint(f"{path}: damaged, or no checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{path}: no checkpoint (it holds a {type(content).__name__})")
    return content


def load_weights(module: LightningModule, path: str | Path) -> int:
    """Load a checkpoint's weights into a configured module and return its step; all that learn must be there.

    Raises: RunError for a missing or damaged file, ValueError where the weights do not fit the module.
    """
    content = read_checkpoint(path)
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"], strict=module.strict_loading)
    return int(content["global_step"])


def digest(content: Any) -> str:
    """Of the values and their order, whatever file they lie in."""
    found = hashlib.blake2b(digest_size=16)
    for part in _parts(content):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, torch.Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)};".encode()
        for key, item in value.items():
            yield from _parts(key)
            yield from _parts(item)
    elif isinstance(value, set | frozenset):
        # In an order that the next process has too.
        yield f"{type(value).__name__} {len(value)};".encode()
        yield from sorted(b"".join(map(bytes, _parts(item))) for item in value)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} {len(value)};".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield f"{type(value).__name__} {value!r};".encode()


def flush_folder(folder: Path) -> None:
    """A rename is on disk only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """The operating system's word where it has one: torch hides `No space left on device` under its own."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if error.__cause__ is None and error.__context__ is None:
            break
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error).splitlines()[0][:120]
