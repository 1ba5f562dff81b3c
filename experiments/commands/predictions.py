"""The replies of `thundercat predict` as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_predictions(folder: str, result: list[Any]) -> Path:
    """Write {key, prompt, reply} rows to `predictions.jsonl` in the run folder and return its path.

    Args:
        folder: the run folder.
        result: what `Trainer.predict` returned: batches of rows, or lists of them where there were several
            loaders.
    """
    path = Path(folder) / "predictions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for row in _rows(result):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _rows(result: Any) -> list[dict[str, str]]:
    if isinstance(result, dict):
        return [result]
    return [row for part in result for row in _rows(part)]
