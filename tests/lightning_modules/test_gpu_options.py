"""What `configs/trainer/gpu.yaml` changes: rounding, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from callbacks.float32_products import Float32Products
from tests.support.small_run import small_config, trained

Run = Callable[..., tuple[int, str, str]]
GPU = "configs/trainer/gpu.yaml"


def test_a_fused_optimiser_takes_the_same_steps(thundercat: Run, tmp_path: Path) -> None:
    weights = []
    for name, words in (("plain", ()), ("fused", ("--model.optimizer.fused=true",))):
        folder = tmp_path / name
        folder.mkdir()
        status, _, err = thundercat("fit", "--config", str(small_config(folder)), *words)
        assert status == 0, err
        weights.append(trained(folder / "run"))
    plain, fused = weights
    for name, value in plain.items():
        torch.testing.assert_close(
            fused[name], value, rtol=0, atol=1e-5
        )  # of 3e-3; Adam divides by tiny gradients


def test_the_file_trains_and_leaves_the_process_as_it_was(thundercat: Run, tmp_path: Path) -> None:
    torch.set_float32_matmul_precision("highest")
    status, _, err = thundercat("fit", "--config", str(small_config(tmp_path)), "--config", GPU)
    assert status == 0, err
    assert torch.get_float32_matmul_precision() == "highest"


def test_mixed_precision_that_clips_is_refused_by_name(thundercat: Run, tmp_path: Path) -> None:
    words = ("--config", GPU, "--trainer.precision=bf16-mixed")
    status, _, err = thundercat("fit", "--config", str(small_config(tmp_path)), *words)
    assert status == 1
    assert "model.optimizer.fused: under trainer.precision bf16-mixed gradients of " in err
    status, _, err = thundercat(
        "fit", "--config", str(small_config(tmp_path)), *words, "--trainer.gradient_clip_val=null"
    )
    assert status == 0, err


def test_products_are_as_precise_as_asked_while_a_trainer_runs() -> None:
    torch.set_float32_matmul_precision("highest")
    callback = Float32Products("high")
    nothing = (None, None, "fit")
    callback.setup(*nothing)  # type: ignore[arg-type]
    callback.setup(*nothing)  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == "high"
    callback.teardown(*nothing)  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == "highest"
    callback.teardown(*nothing)  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ValueError, match="precision: expected 'highest'"):
        Float32Products("low")  # type: ignore[arg-type]
