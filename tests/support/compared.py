"""Run folders to put side by side: two that were measured alike, and one whose attack had another budget."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import yaml

from datamodules.result_lines import Measurement
from datamodules.results import ResultsStore
from tests.support.results import HOSTILE
from tests.support.rows import REFUSAL, measurement, row

N = 20
BROKEN = {"a": 12, "b": 4, "c": 8}
"""Requests that the attack breaks after training, by run; before it breaks 16."""
SOLVED = {"a": 15, "b": 18, "c": 12}
EPSILON = {"a": 0.1, "b": 0.2, "c": 0.1}


def run_folders(root: Path) -> list[Path]:
    """a, b and c below `root`, of `fit` at step 0 and 5; what c's attack may spend is not what others'."""
    return [run_folder(root / name, name) for name in BROKEN]


def run_folder(folder: Path, name: str, stage: str = "fit") -> Path:
    """One of them."""
    store = ResultsStore(folder)
    for step in (0, 5):
        for own, events in _planned(name, step, stage):
            store.announce([own])
            store.add(
                row(
                    f"{own.subject}/{i:02}",
                    own,
                    verdict=i < events,
                    prompt=f"Explain {own.subject} {i}",
                    category=f"kind {i % 2}",
                    attacked=f"Explain {own.subject} {i} ! ! !" if own.attack else None,
                    reply=HOSTILE + "</script><img src=x onerror=\"document.title='broken'\">"
                    if i == 0
                    else f"{name}, step {step}: reply {i}",
                    forward_passes=21 if name == "c" else 11,
                )
                for i in range(N)
            )
    attack = {"class_path": "attacks.PGD", "init_args": {"epsilon": EPSILON[name]}}
    suite = {"attacks": {"gcg": {"class_path": "suffix.GCG", "init_args": {"num_steps": 10}}}}
    config = {
        "seed_everything": 0,
        "model": {"init_args": {"attack": attack}},
        "trainer": {
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "Robustness", "init_args": suite}],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _planned(name: str, step: int, stage: str) -> list[tuple[Measurement, int]]:
    """What is measured of a step, and on how many examples it occurs."""
    model = {"stage": stage, "step": step, "model": f"{name}{step}" if step else "base", "n": N}
    utility = {"subject": "utility", "judge": "exact_match@1", "settings": "utility"}
    spent = "longer" if name == "c" else "short"
    return [
        (measurement("refusal_rate", judge=REFUSAL, settings="plain", **model), 18),
        (measurement("exact_match", **utility, **model), SOLVED[name] if step else 19),
        (measurement("success_rate", settings=spent, **model), BROKEN[name] if step else 16),
    ]


def unpacked(path: Path) -> Any:
    """What a file beside the page hands to it."""
    name, packed = (
        path.read_text(encoding="ascii").removeprefix("thundercat(").removesuffix(");\n").split(",")
    )
    assert json.loads(name) == path.stem
    return json.loads(gzip.decompress(base64.b64decode(json.loads(packed))))
