"""A run of seconds on the packaged model, as a configuration file that tests change by overrides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

SMALL = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 3
  gradient_clip_val: 0.3
  accumulate_grad_batches: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: callbacks.cost.CostMonitor
    - class_path: callbacks.run_folder.checkpoints.RunCheckpoints
model:
  class_path: lightning_modules.adversarial.AdversarialFineTuning
  init_args:
    base: {name_or_path: "tinychat:aligned", lora: {r: 2}}
    attack:
      class_path: lightning_modules.attacks.embedding.pgd.EmbeddingPGD
      init_args: {epsilon: 0.1, num_steps: 2, random_start: true}
    objective:
      class_path: lightning_modules.losses.toward_away.TowardAwayUtility
    optimizer: {lr: 1.0e-3}
data:
  class_path: datamodules.adversarial.AdversarialData
  init_args:
    tokenizer: {name_or_path: "tinychat:aligned"}
    harmful:
      - class_path: datamodules.sources.tinychat.sources.TinyChatHarmful
        init_args: {split: train}
    utility:
      - class_path: datamodules.sources.tinychat.sources.TinyChatBenign
        init_args: {split: train, num_rows: 50}
    harmful_per_step: 2
    utility_per_step: 2
"""


def evaluated(limit: int) -> str:
    """The small run with so many evaluation requests, as one field."""
    rows = {
        "class_path": "datamodules.sources.tinychat.sources.TinyChatHarmful",
        "init_args": {"split": "validation", "limit": limit},
    }
    return f"--data.evaluation={json.dumps({'harmful': [rows]})}"


def small_config(folder: Path) -> Path:
    """The configuration as a file, with `folder/run` as the run folder."""
    path = folder / "small.yaml"
    text = SMALL.replace("  accelerator: cpu", f"  default_root_dir: {folder / 'run'}\n  accelerator: cpu")
    path.write_text(text, encoding="utf-8")
    return path


def start(command: str, config: Path, *arguments: str) -> subprocess.Popen[str]:
    """The same as a process of its own, its output in one stream."""
    words = [sys.executable, "-m", "experiments.cli", command, "--config", str(config), *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint of a run folder."""
    newest = max(folder.glob("checkpoints/step_*.ckpt"))
    state: dict[str, torch.Tensor] = torch.load(newest, weights_only=True)["state_dict"]
    return state


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
