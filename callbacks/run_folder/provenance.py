"""What produced a run: the resolved configuration, git revision, package versions, seed and hardware, in the
run folder."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from callbacks.run_folder.loggers import csv_logs

PACKAGES = (
    "thundercat",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "torchmetrics",
    "wandb",
    "omegaconf",
    "jsonargparse",
    "tokenizers",
    "numpy",
)
CONFIG_FILE, ENVIRONMENT_FILE = "config.yaml", "environment.json"


class Provenance(Callback):
    """Writes `config.yaml` and `environment.json` before the first step; the CLI adds it to every run.

    Args:
        config: the resolved configuration of the run.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        stage = str(
            getattr(stage, "value", stage)
        )  # Lightning passes an enum whose format depends on the Python version
        prefix = "" if stage == "fit" else f"{stage}_"
        (folder / f"{prefix}{CONFIG_FILE}").write_text(
            yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8"
        )
        environment = {"seed": self.config.get("seed_everything"), "stage": stage, **environment_facts()}
        (folder / f"{prefix}{ENVIRONMENT_FILE}").write_text(
            json.dumps(environment, indent=2) + "\n", encoding="utf-8"
        )


@rank_zero_only
def start_record(folder: str | Path) -> None:
    """Drop the evaluations, attacks and CSV log of an earlier run in this folder; a resumed run goes on with
    its own instead."""
    folder = Path(folder)
    for old in csv_logs(folder):
        old.unlink(missing_ok=True)


def environment_facts() -> dict[str, Any]:
    """Git revision, package versions and hardware of this process."""
    return {
        "git": {
            "revision": _git("rev-parse", "HEAD"),
            "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
