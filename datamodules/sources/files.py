"""Files to records, each with the place it stands at.

A file is a local path or `hf://owner/name@revision/path/in/repository`; a hub file without a revision is
refused. A file that cannot be read as what it claims to be stops the run: a half-read file would be a smaller
data set that nobody asked for.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def local_file(path: str) -> Path:
    """A local path as it is, a hub path downloaded (and cached) at its pinned revision.

    Raises: FileNotFoundError or ValueError naming the path and the remedy.
    """
    if not path.startswith("hf://"):
        if "\0" in path or not Path(path).is_file():
            raise FileNotFoundError(
                f"data file {path!r} does not exist; set the path, or THUNDERCAT_DATA to the folder "
                "of public data"
            )
        return Path(path)
    repository, _, name = path.removeprefix("hf://").partition("@")
    revision, _, file = name.partition("/")
    if not revision or not file or repository.count("/") != 1:
        raise ValueError(
            f"expected hf://owner/name@revision/path with a pinned revision, got {path!r}; pin a "
            "commit or tag"
        )
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))


def default_key(path: str, line: int) -> str:
    """Key of a row that has no id: folder, file and line, the same on every machine."""
    return f"{'/'.join(Path(path).parts[-2:])}:{line}"


def read_records(path: str) -> Iterator[tuple[int, Record]]:
    """Yield (line, record) of a csv, json, jsonl, parquet or txt file.

    The line is where the record starts, from 1; in json and parquet files, which have no lines of rows, it is
    the row's number.

    Raises: ValueError `file:line: what; remedy` for an unknown type or a file that is not what it claims.
    """
    readers = {"csv": _csv, "jsonl": _jsonl, "json": _json, "txt": _txt, "parquet": _parquet}
    kind = Path(path).suffix.removeprefix(".")
    if kind not in readers:
        raise ValueError(f"expected a csv, json, jsonl, parquet or txt file, got {path!r}")
    yield from readers[kind](path)


def read_text(path: str) -> str:
    """The text of a UTF-8 file. Raises: ValueError naming the line that is no text."""
    return _text(local_file(path).read_bytes(), path)


def _text(data: bytes, path: str, line: int = 1, bom: bool = True) -> str:
    """Of a file from this line on, which may begin with a byte order mark."""
    try:
        text = data.decode("utf-8-sig" if bom else "utf-8")
    except UnicodeDecodeError as error:
        line += data[: error.start].count(b"\n")
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    if "\0" in text:
        line += text[: text.index("\0")].count("\n")
        raise ValueError(f"{path}:{line}: a NUL character is no text; save the file as UTF-8 text")
    return text


def parse_json(text: str, where: str, kind: type) -> Any:
    """Parsed JSON of the expected kind. Raises: ValueError naming the place."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"{where}: not usable JSON: nested too deeply; flatten the record") from error
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text else where
        raise ValueError(f"{place}: not valid JSON: {error}; mend or remove it") from error
    except ValueError as error:
        raise ValueError(f"{where}: not usable JSON: {error}; mend or remove it") from error
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> Record:
    # Python keeps the last of two equal keys: the first one's target or reply would be lost in silence.
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} occurs twice in one object")
    return record


def _csv(path: str) -> Iterator[tuple[int, Record]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}:1: a column name occurs twice in {header}; rename one")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"{path}:{line}: expected {len(header)} cells as in the header, got {len(cells)}; "
                    "quote cells that hold commas"
                )
            if cells:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not valid CSV: {error}; is a quote left open?") from error


def _jsonl(path: str) -> Iterator[tuple[int, Record]]:
    # Line by line: such a file may be larger than memory.
    with local_file(path).open("rb") as stream:
        for line, data in enumerate(stream, start=1):
            text = _text(data, path, line, bom=line == 1).rstrip("\n")
            if text.strip():
                yield line, parse_json(text, f"{path}:{line}", dict)


def _json(path: str) -> Iterator[tuple[int, Record]]:
    for row, record in enumerate(parse_json(read_text(path), path, list), start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{row}: expected a JSON object as row, got {type(record).__name__}")
        yield row, record


def _txt(path: str) -> Iterator[tuple[int, Record]]:
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            yield line, {"text": text.strip()}


def _parquet(path: str) -> Iterator[tuple[int, Record]]:
    file = local_file(path)
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
    try:
        number = 0
        for batch in parquet.ParquetFile(file).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (ArrowException, OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a readable parquet file: {first}; fetch it again") from error
