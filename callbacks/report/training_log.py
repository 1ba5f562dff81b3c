"""The training rows of a run's CSV logs, as one log."""

from __future__ import annotations

import csv
from pathlib import Path

from callbacks.run_folder.loggers import csv_logs


def read_training_log(folder: Path) -> list[dict[str, str]]:
    """Rows by step; where a run was resumed, the later log replaces what it repeats."""
    rows: list[dict[str, str]] = []
    for path in csv_logs(folder):
        with path.open(encoding="utf-8", newline="") as stream:
            part = [row for row in csv.DictReader(stream) if row.get("train/loss")]
        if part:
            rows = [row for row in rows if int(row["step"]) < int(part[0]["step"])] + part
    return rows
