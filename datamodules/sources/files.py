"""Files to records to mapped columns, each with the place it stands at.

A file is a local path or `hf://owner/name@revision/path/in/repository`; a hub file without a revision is
refused.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.rows import RowProblem


def local_file(path: str) -> Path:
    """A local path as it is, a hub path downloaded (and cached) at its pinned revision.

    Raises: FileNotFoundError or ValueError naming the path and the remedy.
    """
    if not path.startswith("hf://"):
        if not Path(path).is_file():
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


def read_records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, record) of a csv, json, jsonl, parquet or txt file.

    The line is where the record starts, from 1; in json and parquet files, which have no lines of rows, it is
    the row's number.

    Raises: ValueError for an unknown file type or malformed json.
    """
    file = local_file(path)
    kind = file.suffix.removeprefix(".")
    if kind == "csv":
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            line = 2
            for record in reader:
                yield line, record
                line = reader.line_num + 1
    elif kind == "jsonl":
        for line, text in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            if text.strip():
                yield line, parse_json(text, f"{path}:{line}", dict)
    elif kind == "json":
        for row, record in enumerate(parse_json(file.read_text(encoding="utf-8"), path, list), start=1):
            yield row, record if isinstance(record, dict) else {"": record}
    elif kind == "txt":
        for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if text.strip():
                yield line, {"text": text.strip()}
    elif kind == "parquet":
        yield from enumerate(_read_parquet(file), start=1)
    else:
        raise ValueError(f"expected a csv, json, jsonl, parquet or txt file, got {path!r}")


def parse_json(text: str, where: str, kind: type) -> Any:
    """Parsed JSON of the expected kind. Raises: ValueError naming the place."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{file}: reading parquet needs pyarrow; install it with: pip install 'thundercat[parquet]'"
        ) from error
    rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    return rows


def check_columns(field: str, columns: dict[str, str], known: set[str], required: set[str]) -> None:
    """Raises: ValueError naming unknown or missing entries of a column map."""
    if set(columns) - known or required - set(columns):
        raise ValueError(
            f"{field}: expected keys {sorted(required)} and optionally {sorted(known - required)}, "
            f"got {sorted(columns)}"
        )


def pick(record: dict[str, Any], columns: dict[str, str], where: str) -> dict[str, str] | RowProblem:
    """The mapped columns of a record as text, or the problem that prevents it (missing column, wrong type,
    empty)."""
    picked = {}
    for name, column in columns.items():
        if column not in record:
            return RowProblem(
                where, f"missing column {column!r} (for {name}); the row has {sorted(map(str, record))}"
            )
        value = record[column]
        if name in ("key", "category"):
            picked[name] = str(value)
            continue
        if not isinstance(value, str):
            return RowProblem(where, f"expected text in column {column!r}, got {type(value).__name__}")
        if not value.strip():
            return RowProblem(where, f"empty {name} (column {column!r})")
        picked[name] = value
    return picked


def first_exchange(messages: object, where: str) -> dict[str, str] | RowProblem:
    """Prompt and reply of a conversation's first two turns, or the problem that prevents it."""
    if not isinstance(messages, list) or len(messages) < 2:
        return RowProblem(
            where, f"expected messages with a user turn and an answer, got {str(messages)[:60]!r}"
        )
    return pick(
        {"user": messages[0].get("content"), "assistant": messages[1].get("content")},
        {"prompt": "user", "reply": "assistant"},
        where,
    )
