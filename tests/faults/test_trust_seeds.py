"""What the audit found about seeds and strategies, each by its number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from experiments.config.compose import ConfigError, compose
from experiments.config.seeds import seeds_of, with_seeds
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.models.loading import ModelConfig
from lightning_modules.pretrained import check_strategy
from tests.support.small_run import equal, small_config, trained

Run = Callable[..., tuple[int, str, str]]


# A6


def test_a06_a_strategy_that_would_not_synchronise_gradients_is_refused() -> None:
    class Engine(DDPStrategy):
        """As DeepSpeed's is."""

    for refused in (ModelParallelStrategy(), Engine()):
        with pytest.raises(
            ValueError, match=f"trainer.strategy: {type(refused).__name__} .*set trainer.strategy: ddp"
        ):
            check_strategy(refused)
    for allowed in (SingleDeviceStrategy(), DDPStrategy()):
        check_strategy(allowed)


# A9


def test_a09_one_seed_sets_the_others_unless_they_are_set(tmp_path: Path) -> None:
    config = compose([str(small_config(tmp_path))], [("seed_everything", "5")])
    assert seeds_of(with_seeds(config))["model.seed"] == 5
    config = compose([str(small_config(tmp_path))], [("seed_everything", "5"), ("model.seed", "7")])
    assert seeds_of(with_seeds(config))["model.seed"] == 7
    for wrong in ("true", "-1", "1.5", "x"):
        with pytest.raises(ConfigError, match="seed_everything: expected an integer"):
            with_seeds(compose([str(small_config(tmp_path))], [("seed_everything", wrong)]))


def test_a09_another_seed_trains_another_model_and_is_recorded(fit: Run, tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        status = fit(
            f"--seed_everything={seed}", "--trainer.max_steps=1", f"--trainer.default_root_dir={folder}"
        )[0]
        assert status == 0
        record = json.loads((folder / "environment.json").read_text())
        assert (
            record["seed_everything"] == record["seeds"]["model.seed"] == record["seeds"]["data.seed"] == seed
        )
    assert not equal(trained(tmp_path / "0"), trained(tmp_path / "1"))


def test_b_every_step_has_noise_of_its_own(tmp_path: Path) -> None:
    nothing: Any = None
    module = AdversarialFineTuning(ModelConfig("tinychat:aligned"), nothing, None, terms=[nothing])
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    module.trainer = trainer
    drawn = []
    for number in (0, 1):
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer
        progress.step.total.completed = number
        drawn.append(torch.randn(4, generator=module._rng()))
    assert not torch.equal(drawn[0], drawn[1])
