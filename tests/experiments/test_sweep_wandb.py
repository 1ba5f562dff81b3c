"""W&B's agent and its sweeps: the same trial, and a second start that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from experiments.cli import split_overrides
from experiments.config.compose import compose
from experiments.sweeps.trials import configuration
from experiments.sweeps.wandb_backend import run_agent, wandb_sweep
from tests.support.sweep_files import read


def test_the_agent_of_wandb_starts_the_same_trial(
    in_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the agent's own functions: the command that it makes of our file and of a trial's values."""
    parameters = {"vars.epsilon": {"min": 0.05, "max": 0.2}, "vars.layers": {"values": [[1, 3], [0, 2]]}}
    sweep = read(tmp_path, parameters=parameters, constraints=[{"column": "utility", "at_least": 0.9}])
    content = wandb_sweep(str(tmp_path / "sweep.yaml"), sweep, Path("runs/sweeps/x"))
    assert {*content} == {
        "program",
        "command",
        "project",
        "name",
        "method",
        "metric",
        "parameters",
        "run_cap",
    }
    values = {"vars.epsilon": 1e-05, "vars.layers": [0, 2]}
    args = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    words: list[str] = []
    for word in create_sweep_command(content["command"]):
        words += {"${env}": [], "${program}": ["thundercat"]}.get(word, args.get(word[2:-1], [word]))
    assert words[:2] == ["thundercat", "fit"]
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    files = [word.removeprefix("--config=") for word in words[2:] if word.startswith("--config=")]
    overrides, _ = split_overrides([word for word in words[2:] if not word.startswith("--config=")])
    config = compose(files, overrides)
    assert config["trainer"].pop("default_root_dir") == "runs/sweeps/x/abc123"
    (logger,) = config["trainer"].pop("logger")
    assert logger["class_path"].endswith("ResilientWandbLogger")
    own = configuration(sweep, values)
    own["trainer"].pop("default_root_dir")
    assert config == own


def test_a_second_start_of_wandb_goes_on_with_the_same_sweep(
    in_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered, agents = list[str](), list[str]()

    def register(content: dict[str, Any], **_: Any) -> str:
        registered.append(content["method"])
        return f"id{len(registered)}"

    monkeypatch.setattr("wandb.sweep", register)
    monkeypatch.setattr("wandb.agent", lambda name, **_: agents.append(name))
    monkeypatch.setattr("experiments.sweeps.wandb_backend.has_wandb_key", lambda: True)
    parameters = {"vars.epsilon": {"values": [0.05, 0.2]}}
    for method in ("bayes", "bayes", "random"):  # the last is another sweep
        sweep = read(tmp_path, parameters=parameters, method=method)
        assert run_agent(str(tmp_path / "sweep.yaml"), sweep, tmp_path / "place") == 0
    assert registered == ["bayes", "random"] and agents == ["id1", "id1", "id2"]
