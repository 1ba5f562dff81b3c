"""What `configs/trainer/gpu.yaml` changes: rounding, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from callbacks.float32_products import Float32Products
from callbacks.run_folder.decisive import decisive, differences
from experiments.config.compose import compose
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.base import OptimizerConfig
from lightning_modules.models.loading import ModelConfig
from lightning_modules.supervised import SupervisedFineTuning
from tests.conftest import tinychat_format
from tests.support.small_run import small_config, trained

Run = Callable[..., tuple[int, str, str]]
GPU = "configs/trainer/gpu.yaml"
CALLBACK = "callbacks.float32_products.Float32Products"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str]]:
    """Of every training step: whether its optimiser is fused, and how fp32 products are computed."""
    found: list[tuple[bool, str]] = []
    started = AdversarialFineTuning.training_step

    def noted(self: AdversarialFineTuning, *given: Any) -> Any:
        (optimiser,) = self.trainer.optimizers
        found.append((bool(optimiser.defaults["fused"]), torch.get_float32_matmul_precision()))
        return started(self, *given)

    monkeypatch.setattr(AdversarialFineTuning, "training_step", noted)
    return found


def test_a_fused_optimiser_takes_the_same_steps(
    thundercat: Run, tmp_path: Path, seen: list[tuple[bool, str]]
) -> None:
    weights = []
    for name, words in (("plain", ()), ("fused", ("--model.optimizer.fused=true",))):
        folder = tmp_path / name
        folder.mkdir()
        status, _, err = thundercat("fit", "--config", str(small_config(folder)), *words)
        assert status == 0, err
        weights.append(trained(folder / "run"))
    assert seen == [(False, "highest")] * 3 + [(True, "highest")] * 3
    plain, fused = weights
    for name, value in plain.items():
        torch.testing.assert_close(
            fused[name], value, rtol=0, atol=1e-5
        )  # of 3e-3; Adam divides by tiny gradients


@pytest.mark.parametrize("files", [[GPU], [GPU, GPU]], ids=["once", "twice"])
def test_the_file_trains_and_leaves_the_process_as_it_was(
    files: list[str], thundercat: Run, tmp_path: Path, seen: list[tuple[bool, str]]
) -> None:
    torch.set_float32_matmul_precision("highest")
    given = [word for file in files for word in ("--config", file)]
    status, _, err = thundercat("fit", "--config", str(small_config(tmp_path)), *given)
    assert status == 0, err
    assert seen == [(True, "high")] * 3
    assert torch.get_float32_matmul_precision() == "highest"


def test_bf16_clips_the_gradients_of_a_fused_optimiser_too(
    thundercat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, norms, weights = torch.nn.utils.clip_grad_norm_, [], []

    def noted(parameters: Iterable[Tensor], most: float) -> Tensor:
        norms.append((float(clip(parameters := list(parameters), most)), most))
        assert float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()) < 0.301
        return torch.tensor(0.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)
    for name, words in (("plain", ()), ("fused", ("--model.optimizer.fused=true",))):
        folder = tmp_path / name
        folder.mkdir()
        own = ("--config", str(small_config(folder)), "--trainer.precision=bf16-mixed", *words)
        status, _, err = thundercat("fit", *own)
        assert status == 0, err
        weights.append(trained(folder / "run"))
    plain, fused = norms[:3], norms[3:]
    assert len(plain) == len(fused) == 3 and max(norms)[0] > 0.3
    assert plain == [pytest.approx(own, rel=1e-2) for own in fused]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=1e-4)


def test_fp16_s_scaler_and_clipping_are_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU has no fp16 to train in: the trainer stands in."""
    module = SupervisedFineTuning(ModelConfig("tinychat:base"), OptimizerConfig(fused=True))
    monkeypatch.setattr("lightning_modules.pretrained.check_strategy", lambda _: None)
    module.attach(tinychat_format())
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer = SimpleNamespace(
        strategy=None, precision_plugin=plugin, precision="16-mixed", gradient_clip_val=0.3
    )
    module._trainer = trainer  # type: ignore[assignment]
    with pytest.raises(ValueError, match="optimizer.fused: under trainer.precision 16-mixed"):
        module.setup("fit")
    module.setup("test")
    trainer.gradient_clip_val = None
    module.setup("fit")


def test_a_run_that_fails_leaves_the_process_as_it_was(thundercat: Run, tmp_path: Path) -> None:
    torch.set_float32_matmul_precision("highest")
    words = (
        "--config",
        GPU,
        f"--model.base.name_or_path={tmp_path}",
        "--data.tokenizer.name_or_path=tinychat:base",
    )
    assert thundercat("fit", "--config", str(small_config(tmp_path)), *words)[0] != 0
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_are_as_precise_as_asked_while_a_trainer_runs() -> None:
    torch.set_float32_matmul_precision("highest")
    callback, twin = Float32Products("high"), Float32Products("high")
    nothing: Any = (SimpleNamespace(callbacks=[callback, twin]), None, "fit")
    for own in (callback, twin, callback):
        own.setup(*nothing)
    assert torch.get_float32_matmul_precision() == "high"
    for own in (callback, twin, callback):
        own.teardown(*nothing)
        assert torch.get_float32_matmul_precision() == "highest"
    nothing[0].callbacks.append(Float32Products("highest"))
    with pytest.raises(ValueError, match=r"one precision of Float32Products, got \['high', 'highest'\]"):
        callback.setup(*nothing)
    with pytest.raises(ValueError, match="precision: expected 'highest'"):
        Float32Products("low")  # type: ignore[arg-type]


def test_the_precision_of_products_decides_the_weights() -> None:
    plain = decisive(compose(["configs/quickstart.yaml"], []))
    rounded = decisive(compose(["configs/quickstart.yaml", GPU], [("model.optimizer.fused", "null")]))
    as_it_is = json.dumps([{"class_path": CALLBACK, "init_args": {"precision": "highest"}}])
    highest = decisive(compose(["configs/quickstart.yaml"], [("trainer.callbacks", as_it_is)]))
    assert differences(plain, highest) == []
    *_, told = differences(plain, rounded)
    assert told == 'trainer.callbacks.Float32Products.precision: (unset) then, "high" now'
