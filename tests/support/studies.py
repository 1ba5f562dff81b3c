"""A study's file, written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from experiments.studies.definition import Study, load_study

CAT = ["configs/experiment/methods_tinychat.yaml", "configs/method/cat.yaml"]
COLUMNS = {"utility": {"quantity": "exact_match", "subject": "utility"}}


def given(path: Path, runs: dict[str, Any], **more: Any) -> Path:
    path.write_text(yaml.safe_dump({"title": "A study", "runs": runs, "columns": COLUMNS, **more}))
    return path


def read(path: Path, runs: dict[str, Any], **more: Any) -> Study:
    return load_study(given(path / "study.yaml", runs, **more))
