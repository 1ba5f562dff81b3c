"""A sweep's file, written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from experiments.sweeps.definition import Sweep, load_sweep

CAT = ["configs/experiment/methods_tinychat.yaml", "configs/method/cat.yaml"]
EMBEDDING = {"quantity": "success_rate", "subject": "harmful", "attack": "embedding"}
GIVEN: dict[str, Any] = {
    "method": "random",
    "run_cap": 3,
    "metric": {"name": "eval/harmful/embedding/success_rate", "goal": "minimize"},
    "parameters": {"vars.epsilon": {"min": 0.05, "max": 0.2}},
    "config": CAT,
    "columns": {"embedding": EMBEDDING, "utility": {"quantity": "exact_match", "subject": "utility"}},
}
METRIC = GIVEN["metric"]


def read(folder: Path, **changes: Any) -> Sweep:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**GIVEN, **changes}))
    return load_sweep(path)
