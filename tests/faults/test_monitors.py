"""What the audit found about monitors: they see what evaluations measure, under one name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from callbacks.report.load import load

Run = Callable[..., tuple[int, str, str]]


MONITORED = """
trainer:
  callbacks:
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: eval/harmful/direct/success_rate, mode: max, patience: 1}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {monitor: eval/harmful/direct/success_rate, mode: min, every_n_train_steps: 1, dirpath: BEST}
    - class_path: callbacks.evaluations.robustness.RobustnessEvaluation
      init_args:
        schedule: {every_n_steps: 3, at_start: true, limit: 2}
        max_new_tokens: 4
        attacks: {direct: {class_path: lightning_modules.attacks.text.rewrites.DirectRequest}}
data:
  init_args:
    harmful:
      - class_path: datamodules.sources.tinychat.sources.TinyChatHarmful
        init_args: {split: train, limit: 4}
    utility:
      - class_path: datamodules.sources.tinychat.sources.TinyChatBenign
        init_args: {split: train, num_rows: 8}
"""


def monitored(folder: Path, thundercat: Run) -> Path:
    """A run of epochs of two steps, stopped by a monitor; returns its folder."""
    config = folder / "monitored.yaml"
    config.write_text(MONITORED.replace("BEST", str(folder / "best")))
    status, _, err = thundercat(
        "fit",
        *("--config", "configs/experiment/cat_tinychat.yaml", "--config", str(config)),
        *(f"--trainer.default_root_dir={folder / 'run'}", "--trainer.max_steps=9"),
        *("--data.harmful_per_step=2", "--data.utility_per_step=2", "--model.attack.num_steps=1"),
        *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    )
    assert status == 0, err
    return folder / "run"


def test_a17_early_stopping_and_model_checkpoint_monitor(tmp_path: Path, thundercat: Run) -> None:
    run = monitored(tmp_path, thundercat)
    # The value of step 3 is no better than that of step 0, so training stops at the epoch that ends with
    # step 4, and what `at_end` asks for is measured there.
    assert [own.step for own in load(run).snapshots] == [0, 3, 4]
    (best,) = (tmp_path / "best").glob("*.ckpt")
    states = torch.load(best, weights_only=True)["callbacks"]
    (saved,) = [state for name, state in states.items() if name.startswith("ModelCheckpoint")]
    assert saved["monitor"] == "eval/harmful/direct/success_rate"
    assert float(saved["best_model_score"]) == 0.0


def test_a17_a_metric_is_one_chart(tmp_path: Path, thundercat: Run) -> None:
    header = (monitored(tmp_path, thundercat) / "csv" / "metrics.csv").read_text().splitlines()[0]
    own = [name for name in header.split(",") if name.startswith("eval/")]
    assert "eval/harmful/direct/success_rate" in own
    assert not [name for name in own if name.endswith(("/low", "/high", "/n"))]
