"""What the files named in a configuration held: the same path with another content is another run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.text.tokenizers import resolve_path

CONTENT = "content"
"""`model.base.name_or_path.content` holds the fingerprint of what `model.base.name_or_path` names."""
WHOLE = 64 * 2**20
"""Bytes up to which all of a file is read."""
SAMPLE = 2**20
"""Bytes read at each end of a larger one: 14 GB of weights must not delay every start by a minute. A
safetensors file begins with its header, and training changes the weights at its end as elsewhere."""
WEIGHTS = ("*.safetensors", "*.gguf", "config.json", "adapter_config.json", "tokenizer.json")
"""What of a model's folder decides a run."""


def fingerprints(fields: Mapping[str, Any]) -> dict[str, str]:
    """`field.content` -> fingerprint, for every field whose value names a file, or a folder with weights.

    Names that are found nowhere on this machine (hub ids, files that are missing) have none: who loads them
    says so.
    """
    found: dict[str, str] = {}
    for field, value in fields.items():
        for text in value if isinstance(value, list) else [value]:
            for path in _files(text):
                digest = hashlib.sha256(found.get(f"{field}.{CONTENT}", "").encode() + _of_file(path))
                found[f"{field}.{CONTENT}"] = digest.hexdigest()[:16]
    return found


def _files(value: Any) -> Iterator[Path]:
    if not isinstance(value, str) or not value or "\n" in value or len(value) > 1000:
        return
    try:
        path = Path(resolve_path(value))
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from sorted(own for pattern in WEIGHTS for own in path.glob(pattern) if own.is_file())
    except (OSError, ValueError):
        return  # a name that is no path, or a packaged model that does not exist: its loader says so


def _of_file(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as stream:
        if size <= WHOLE:
            while block := stream.read(SAMPLE):
                digest.update(block)
        else:
            digest.update(stream.read(SAMPLE))
            stream.seek(size - SAMPLE)
            digest.update(stream.read())
    return digest.digest()
