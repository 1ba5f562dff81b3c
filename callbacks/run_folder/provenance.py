"""What produced a run: the resolved configuration, git revision, package versions, seeds and hardware, in its
folder."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer

from callbacks.run_folder.folder import RunFolder
from lightning_modules.defences.base import label

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


class _Dumper(yaml.SafeDumper):
    """Quotes texts that our files read as numbers and PyYAML's default does not: a revision `12e4567` would
    come back from config.yaml as infinity."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


class Provenance(Callback):
    """Writes `config.yaml` and `environment.json` before the first step; the CLI adds it to every run.

    Args:
        config: the resolved configuration of the run.
        seeds: the seed of each part, by its place in the configuration.
    """

    def __init__(self, config: dict[str, Any], seeds: dict[str, int] | None = None) -> None:
        self.config = config
        self.seeds = seeds or {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning passes an enum whose format depends on the Python version.
        named = str(getattr(stage, "value", stage))
        # A training's stands for what was begun: a model that cannot be loaded must leave nothing that a
        # corrected call would have to agree with.
        if named != "fit":
            self._record(trainer, named, label(getattr(pl_module, "defence", None)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, "fit")

    def _record(self, trainer: Trainer, stage: str, defence: str = "") -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self.write(RunFolder.of(trainer.default_root_dir), stage, defence)

    def write(self, folder: RunFolder, stage: str, defence: str = "") -> None:
        """Both files of a stage, each whole or not there.

        The checkpoint that a command began from is of that call alone: in the configuration it would be the
        next call's too, and `test --config RUN/config.yaml` would not be of the model before training.
        """
        own = {key: value for key, value in self.config.items() if key != "ckpt_path"}
        write_whole(folder.config(stage, defence), dumped(own))
        facts = {name: self.config.get(name) for name in ("seed_everything", "ckpt_path")}
        environment = {**facts, "seeds": self.seeds, "stage": stage, **environment_facts()}
        write_whole(folder.environment(stage, defence), json.dumps(environment, indent=2) + "\n")


def dumped(config: Mapping[str, Any]) -> str:
    """A configuration as YAML that our files read as it is."""
    return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False)


def write_whole(path: Path, text: str) -> None:
    """Write a small file beside its place and rename it, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


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
