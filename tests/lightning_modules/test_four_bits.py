"""Adapters on a base in 4 bits, in two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from callbacks.report.training_log import read_training_log
from callbacks.run_folder.checkpoint_files import read_checkpoint
from tests.support.forked import in_two_processes
from tests.support.small_run import small_config

Run = Callable[..., tuple[int, str, str]]
STEPS = 2


def test_two_processes_train_adapters_on_a_base_in_four_bits_as_one(thundercat: Run, tmp_path: Path) -> None:
    """Up to bf16's rounding, in which 4-bit weights are multiplied."""
    pytest.importorskip("bitsandbytes", reason="the base is in 4 bits")
    words = ["fit", "--config", str(small_config(tmp_path)), "--config", "configs/model/nf4.yaml"]
    words += ["--model.attack.random_start=false", "--model.base.lora.dropout=0.0"]
    words += ["--data.harmful_per_step=4", f"--trainer.max_steps={STEPS}"]
    one, two = tmp_path / "one", tmp_path / "two"
    status, _, error = thundercat(*words, f"--trainer.default_root_dir={one}")
    assert status == 0, error
    words.append(f"--trainer.default_root_dir={two}")
    in_two_processes(words, tmp_path, "--config", "configs/trainer/ddp.yaml")
    for a, b in zip(read_training_log(one), read_training_log(two), strict=True):
        assert float(b["train/loss"]) == pytest.approx(float(a["train/loss"]), rel=0.01)
    # All weights' together: single ones hardly differ from 0.
    a, b = _gradients(one), _gradients(two)
    assert (a - b).norm() < 0.02 * a.norm()


def _gradients(folder: Path) -> Tensor:
    """Of all steps, as Adam's first moments."""
    path = folder / "checkpoints" / f"step_{STEPS:06d}.ckpt"
    (adam,) = read_checkpoint(path)["optimizer_states"]
    return torch.cat([state["exp_avg"].flatten() for state in adam["state"].values()])
