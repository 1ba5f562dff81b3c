"""What the files named in a configuration held: the same path with another content is another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.text.model_files import resolve_path

CONTENT = "content"
"""`model.base.name_or_path.content` holds the fingerprint of what `model.base.name_or_path` names."""
SAMPLED = {".safetensors", ".gguf"}
"""Weights, of which a sample is read: 14 GB must not delay every start by a minute, and training changes
weights at the end of a file as elsewhere."""
WHOLE = 64 * 2**20
"""Bytes up to which weights too are read whole."""
BLOCK = 2**20
"""Bytes read at a time, and at each end of larger weights."""
MODEL_FILES = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""What of a model's folder decides what it says: weights, configuration, tokenizer, template, code."""
ROW_FILES = ("rows/rows_rank*.jsonl*",)
"""What of a run's folder is data for another run."""
LONGEST_PATH = 1000
"""Longer texts are no file's name."""


def fingerprints(fields: Mapping[str, Any]) -> dict[str, str]:
    """`field.content` -> fingerprint, for every field whose value names a file, a model's folder or a run's.

    Names that are found nowhere on this machine (hub ids, files that are missing) have none: who loads them
    says so.
    """
    found = {}
    for field, value in fields.items():
        names = value if isinstance(value, list) else [value]
        marks = [mark for name in names if (mark := fingerprint(name, (*MODEL_FILES, *ROW_FILES)))]
        if marks:
            found[f"{field}.{CONTENT}"] = " ".join(marks)
    return found


def fingerprint(name: Any, patterns: tuple[str, ...] = MODEL_FILES) -> str | None:
    """Of the file, or of the files of these patterns in the folder, that a text names; None where it names
    none."""
    digest = hashlib.sha256()
    paths = list(_files(name, patterns)) if isinstance(name, str) else []
    for path in paths:
        digest.update(_of_file(path))
    return digest.hexdigest()[:16] if paths else None


def _files(name: str, patterns: tuple[str, ...]) -> Iterator[Path]:
    if not name or "\n" in name or len(name) > LONGEST_PATH:
        return
    try:
        path = Path(resolve_path(name))
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from sorted({own for p in patterns for own in path.glob(p) if own.is_file()})
            yield from _adapted(path, patterns)
    except (OSError, ValueError):
        return  # a name that is no path, or a packaged model that does not exist: its loader says so


def _adapted(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """The model that saved adapters in this folder are put on."""
    path = folder / "adapter_config.json"
    if path.is_file():
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if isinstance(base, str) and Path(base).resolve() != folder.resolve():
            yield from _files(base, patterns)


def _of_file(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as stream:
        if size > WHOLE and path.suffix in SAMPLED:
            digest.update(stream.read(BLOCK))
            stream.seek(size - BLOCK)
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.digest()
