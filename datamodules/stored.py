"""Encoded conversations on disk, for sources of millions of rows: made once, in parts, and memory-mapped.

    STORE/DIGEST/part_000000.arrow   ids, which of them are learned, length, key and place of every row
    STORE/DIGEST/part_000000.json    how many rows of the sources that took, and which could not be used
    STORE/DIGEST/complete.json       written last

The digest is of everything that decides the rows. A kill costs the part under way; memory holds a few
thousand rows while they are encoded, and four bytes a row afterwards (beside the order of rows, streams.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.rows import ChatRow, RowProblem
from datamodules.text.encoding import IGNORED, EncodedChat

log = logging.getLogger(__name__)
CHUNK = 1_000
"""Rows that are encoded, and written, at a time."""
PART_CHUNKS = 20
COMPLETE = "complete.json"
FORMAT = 1
"""Of the files, and of how a row becomes ids: raised where the same settings give other rows, and with the
package's version a part of what decides them."""

Encode = Callable[[list[ChatRow | RowProblem]], tuple[list[EncodedChat], list[RowProblem]]]
"""Rows of the sources -> those that are trained on, and why others are not."""


@dataclass(frozen=True)
class StoredChat:
    """A conversation as token ids, all that training needs of it."""

    ids: list[int]
    labels: list[int]

    @property
    def length(self) -> int:
        return len(self.ids)


class StoredChats(Sequence[StoredChat]):
    """The conversations of a store, by number; only those that are asked for are read.

    Args:
        folder: a complete one.

    Raises: ValueError naming a file that is not what was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = [_opened(file) for file in sorted(folder.glob("part_*.arrow"))]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        said = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["rows"]
        if said != len(self):
            raise _damaged(folder, f"it holds {len(self)} rows of {said}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: Any) -> Any:
        """Raises: IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        row = self._parts[which].slice(int(number - self._starts[which]), 1)
        ids, learned = row["ids"][0].as_py(), row["learned"][0].as_py()
        return StoredChat(ids, [i if own else IGNORED for i, own in zip(ids, learned, strict=True)])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every row."""
        return np.concatenate([part["length"].to_numpy() for part in self._parts] or [np.empty(0, np.int32)])

    @cached_property
    def problems(self) -> list[RowProblem]:
        """Rows that could not be used."""
        files = sorted(self.folder.glob("part_*.json"))
        return [RowProblem(**own) for file in files for own in _record(file)["problems"]]

    def twins(self) -> tuple[str, str, str] | None:
        """A key that two rows have, and their places; None where there is none."""
        marks = np.concatenate([part["mark"].to_numpy() for part in self._parts] or [np.empty(0, np.int64)])
        ordered = np.sort(marks)
        for mark in np.unique(ordered[1:][ordered[1:] == ordered[:-1]]):
            seen: dict[str, str] = {}
            for number in np.flatnonzero(marks == mark):
                which = int(np.searchsorted(self._starts, number, side="right")) - 1
                row = self._parts[which].slice(int(number - self._starts[which]), 1)
                key, where = row["key"][0].as_py(), row["where"][0].as_py()
                if key in seen:
                    return key, seen[key], where
                seen[key] = where
        return None


def lengths_of(rows: Sequence[Any]) -> Sequence[int] | np.ndarray:
    """Tokens of every encoded row, wherever it is kept."""
    return rows.lengths if isinstance(rows, StoredChats) else [example.length for example in rows]


def is_complete(folder: Path) -> bool:
    return (folder / COMPLETE).is_file()


def write_store(folder: Path, rows: Iterable[ChatRow | RowProblem], encode: Encode) -> None:
    """Encode what the folder lacks, part by part.

    Args:
        folder: of this digest; parts that are there are kept.
        rows: all rows of the sources, in their order.
        encode: encodes some of them.

    Raises: ValueError where pyarrow is missing, or what the sources and `encode` raise.
    """
    import_arrow()
    folder.mkdir(parents=True, exist_ok=True)
    done = _done(folder)
    read, count = sum(part["read"] for part in done), sum(part["rows"] for part in done)
    if read:
        log.info("%s: %d rows are encoded already", folder, count)
    remaining = islice(iter(rows), read, None)
    number = len(done)
    while chunks := _part(remaining):
        kept = _write_part(folder, number, chunks, encode)
        number, count = number + 1, count + kept
    _write(folder / COMPLETE, json.dumps({"rows": count, "parts": number}).encode())


def import_arrow() -> Any:
    """pyarrow. Raises: ValueError where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            "data.utility_store: needs pyarrow; pip install pyarrow, or set it to null"
        ) from error
    return pyarrow


def _part(rows: Iterator[ChatRow | RowProblem]) -> list[list[ChatRow | RowProblem]]:
    """The next part's rows, in chunks; empty at the end."""
    chunks = (list(islice(rows, CHUNK)) for _ in range(PART_CHUNKS))
    return [chunk for chunk in chunks if chunk]


def _write_part(folder: Path, number: int, chunks: list[list[ChatRow | RowProblem]], encode: Encode) -> int:
    """Returns how many rows it holds."""
    arrow = import_arrow()
    schema = arrow.schema(
        [
            ("ids", arrow.list_(arrow.int32())),
            ("learned", arrow.list_(arrow.bool_())),
            ("length", arrow.int32()),
            ("key", arrow.string()),
            ("where", arrow.string()),
            ("mark", arrow.int64()),
        ]
    )
    name, rows = f"part_{number:06d}", 0
    problems: list[RowProblem] = []
    # Of this process: another run may be writing the same part, which will hold the same.
    partial = folder / f"{name}.{os.getpid()}.partial"
    with partial.open("wb") as stream:
        with arrow.ipc.new_file(stream, schema) as writer:
            for chunk in chunks:
                encoded, unusable = encode(chunk)
                writer.write_batch(arrow.RecordBatch.from_pylist([_stored(own) for own in encoded], schema))
                rows, problems = rows + len(encoded), problems + unusable
        stream.flush()
        os.fsync(stream.fileno())
    digest = _digest(partial)
    partial.replace(folder / f"{name}.arrow")
    record = {
        "rows": rows,
        "read": sum(map(len, chunks)),
        "digest": digest,
        "problems": [{"where": own.where, "reason": own.reason} for own in problems],
    }
    _write(folder / f"{name}.json", json.dumps(record).encode())
    return rows


def _stored(example: EncodedChat) -> dict[str, Any]:
    key = example.row.key
    return {
        "ids": example.ids,
        "learned": [label != IGNORED for label in example.labels],
        "length": example.length,
        "key": key,
        "where": example.row.where,
        "mark": int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big", signed=True),
    }


def _done(folder: Path) -> list[dict[str, Any]]:
    """Records of the whole parts, up to the first that is missing."""
    records = []
    for number in range(len(list(folder.glob("part_*.json")))):
        file = folder / f"part_{number:06d}.json"
        if not file.is_file() or not file.with_suffix(".arrow").is_file():
            break
        records.append(_record(file))
    return records


def _record(file: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def _opened(file: Path) -> Any:
    arrow = import_arrow()
    # Read once by every process that opens it: seconds for gigabytes, and nothing trains on other rows.
    if _digest(file) != _record(file.with_suffix(".json"))["digest"]:
        raise _damaged(file, "it is not what was written")
    try:
        return arrow.ipc.open_file(arrow.memory_map(str(file))).read_all()
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(file, str(error).splitlines()[0]) from error


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _damaged(path: Path, why: str) -> ValueError:
    folder = path if path.is_dir() else path.parent
    return ValueError(
        f"data.utility_store: {path} is damaged ({why}); remove {folder} to encode its rows again"
    )


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)
