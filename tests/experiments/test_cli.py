"""The command line as a user meets it: calls, overrides, errors with field and remedy, help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.config.check import check_precision
from experiments.config.compose import ConfigError, compose
from tests.conftest import ROOT

Run = Callable[..., tuple[int, str, str]]
TINYCHAT = "configs/experiment/cat_tinychat.yaml"


def test_several_files_compose(thundercat: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "trainer: {max_steps: 7}\nmodel: {init_args: {attack: {init_args: {epsilon: 0.3}}}}\n"
    )
    status, out, _ = thundercat(
        "fit",
        "-c",
        TINYCHAT,
        "--config",
        str(tmp_path / "mine.yaml"),
        "--trainer.max_steps",
        "9",
        "--print_config",
    )
    printed = yaml.safe_load(out)
    assert status == 0
    assert printed["trainer"]["max_steps"] == 9
    assert printed["model"]["init_args"]["attack"]["init_args"]["epsilon"] == 0.3
    # What was printed is a configuration of its own.
    (tmp_path / "printed.yaml").write_text(out)
    assert compose([str(tmp_path / "printed.yaml")], []) == printed


# --- errors


@pytest.mark.parametrize(
    ("override", "field", "found"),
    [
        ("--model.attack.epslion=0.1", "model.attack.epslion", "unknown field, did you mean 'epsilon'?"),
        ("--model.attack.epsilon=abc", "model.attack.epsilon", "got 'abc'"),
        ("--model.attack.epsilon=0", "model.attack.epsilon", "expected a number > 0 or null, got 0"),
        ("--model.attack.num_steps=0", "num_steps", ">= 1, got 0"),
        (
            "--model.attack.step_rule=newton",
            "model.attack.step_rule",
            "expected 'sign' | 'l2' | 'adam', got 'newton'",
        ),
        (
            "--model.attack={a: 1}",
            "model.attack.a",
            "expected class_path and init_args (Attack) at model.attack",
        ),
        ("--model.attack=[1]", "model.attack", "expected class_path and init_args (Attack), got [1]"),
        ("--model.attack=3", "model.attack", "expected class_path and init_args (Attack), got 3"),
        ("--model.objective.cutoff_away=5", "cutoff_away", "<= 0"),
        ("--model.objective.cutoff_toward=-1", "cutoff_toward", ">= 0"),
        ("--model.attack=EmbeddingPGDD", "class 'EmbeddingPGDD'", "did you mean 'EmbeddingPGD'?"),
        (
            "--model.attack.class_path=lightning_modules.attacks.embedding.pgd.PGD",
            "model.attack.class_path",
            "no class 'PGD' in lightning_modules.attacks.embedding.pgd",
        ),
        (
            "--model.class_path=callbacks.health.AttackHealth",
            "model.class_path",
            "expected a kind of LightningModule",
        ),
        ("--model.base.dtyp=float32", "model.base.dtyp", "unknown field, did you mean 'dtype'?"),
        ("--model.base.lora.r=-1", "base.lora.r", "got -1"),
        ("--model.optimizer=3", "model.optimizer", "expected fields of OptimizerConfig or null, got 3"),
        ("--model.optimizer.lr=0", "optimizer.lr", "got 0"),
        ("--trainer.max_step=3", "trainer.max_step", "unknown field, did you mean 'max_steps'?"),
        ("--trainer.precision=16-mixed", "trainer.precision", "'16-mixed' needs a GPU"),
        ("--trainer=3", "trainer", "expected fields of the Trainer, got 3"),
        ("--data.harmful_per_step=x", "data.harmful_per_step", "got 'x'"),
        ("--data.micro_batches=3", "data.harmful_per_step", "expected a multiple of micro_batches 3, got 8"),
        ("--data.attack_batch=3", "data.attack_batch", "harmful rows of a pass that divides"),
        ("--modell.x=1", "modell", "unknown field, did you mean 'model'?"),
        ("--ckpt_path=nowhere.ckpt", "ckpt_path", "no file 'nowhere.ckpt'"),
        ("--data.seed.x=1", "data.seed.x", "at data.seed, got fields"),
        ("--model.base.quantization=nf4", "base.quantization", "expected base.lora to be set"),
        ("--trainer.callbacks.99.limit=1", "--trainer.callbacks.99.limit", "expected a number below"),
        ("--data.harmful_per_step=${nowhere}", "data", "Interpolation key 'nowhere' not found"),
        (
            "--vars.gcg_limits=1",
            "vars.gcg_limits",
            "unknown variable, did you mean 'gcg_limit'?; these files use: ",
        ),
        ("naked", "expected an option", "got 'naked'; files are given with --config"),
        ("-x=1", "unknown option '-x'", "see thundercat --help"),
        ("--a..b=1", "--a..b", "expected names joined by dots"),
    ],
)
def test_errors_name_field_and_remedy_before_a_model_is_loaded(
    override: str, field: str, found: str, thundercat: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lightning_modules.pretrained.load_seeded", never)
    status, _, err = thundercat("fit", "--config", TINYCHAT, "--trainer.accelerator=cpu", override)
    assert status == 2
    assert err.startswith(f"thundercat: {field}") or f"{field}: " in err
    assert found in err
    assert len(err.strip().splitlines()) == 1


def test_a_variable_may_come_from_one_override_and_be_used_in_another(thundercat: Run) -> None:
    status, out, _ = thundercat(
        "fit", "--config", TINYCHAT, "--vars.mine=7", "--data.seed=${vars.mine}", "--print_config"
    )
    assert status == 0
    assert yaml.safe_load(out)["data"]["init_args"]["seed"] == 7


def test_missing_pieces(thundercat: Run, tmp_path: Path) -> None:
    assert "expected at least one --config FILE" in thundercat("fit")[2]
    assert "no file 'nowhere.yaml'" in thundercat("fit", "--config", "nowhere.yaml")[2]
    assert "expected a command of fit" in thundercat("train")[2]
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    assert "not valid YAML" in thundercat("fit", "--config", str(tmp_path / "bad.yaml"))[2]
    (tmp_path / "thin.yaml").write_text("trainer: {max_steps: 1}\n")
    assert (
        "model: expected class_path and init_args"
        in thundercat("fit", "--config", str(tmp_path / "thin.yaml"))[2]
    )
    assert "no results of `fit`" in thundercat("report", str(tmp_path))[2]


def test_errors_come_in_seconds() -> None:
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "experiments.cli",
        "fit",
        "--config",
        TINYCHAT,
        "--model.attack.epsilon=-1",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert "got -1" in done.stderr
    assert time.monotonic() - began < 60


def test_precision_the_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    with pytest.raises(
        ConfigError, match="'bf16-mixed' is not supported by Old GPU; set 32-true or 16-mixed"
    ):
        check_precision("bf16-mixed", "auto")
    check_precision("16-mixed", "gpu")


# --- help


def test_help(thundercat: Run) -> None:
    assert "--print_config" in thundercat("test", "--help")[1]
    assert "report" in thundercat("--help")[1]
    status, out, _ = thundercat("fit", "--config", TINYCHAT, "--help")
    assert status == 0
    said = " ".join(out.split())
    assert re.search(r"epsilon \(.* or null, default 0.05\): radius of the ball in `radius_unit`", said)
    assert re.search(r"base\.lora\.r \(an integer.*, default 64\): Rank", said)
    assert re.search(r"harmful_per_step \(an integer.*, default 8\): harmful rows per optimiser step", said)
    assert "max_steps (an integer >= -1, default -1): Stop training after this number of steps" in said
    assert max(map(len, out.splitlines())) <= 110
    assert "num_tokens" in thundercat("fit", "--help.SoftPrompt")[1]
    assert (
        "no such class in the project, did you mean 'SoftPrompt'?" in thundercat("fit", "--help.SoftPromt")[2]
    )


def test_help_says_every_class_once_under_all_its_places(thundercat: Run) -> None:
    _, out, _ = thundercat("fit", "--config", TINYCHAT, "--help")
    assert out.count("EmbeddingPGD: PGD within") == 1
    places = out.partition("  lightning_modules.attacks.embedding.pgd.EmbeddingPGD")[0].splitlines()[-1]
    assert places.startswith("model.attack, trainer.callbacks.")


def test_version_and_list(thundercat: Run) -> None:
    assert thundercat("--version")[:2] == (0, f"thundercat {version('thundercat')}\n")
    status, out, _ = thundercat("list")
    assert status == 0
    assert {"recipes:", "methods:", "attacks:", "models:", "judges:"} <= set(out.split("\n"))
    lines = thundercat("list", "attacks")[1].splitlines()
    assert len(lines) == len(list((ROOT / "configs" / "attack").glob("*.yaml")))
    assert any(re.match(r" +configs/attack/gcg\.yaml +Greedy Coordinate Gradient", line) for line in lines)
    assert "unknown kind 'attack', did you mean 'attacks'?" in thundercat("list", "attack")[2]


def test_words_that_are_no_call(thundercat: Run) -> None:
    for words, message in {
        ("tset",): "got 'tset', did you mean 'test'?",
        ("report",): "the following arguments are required: RUN; see thundercat report --help",
        ("report", "a", "b"): "unknown option 'b'",
        ("fit", "--config"): "argument -c/--config: expected one argument",
        ("fit", "--model.seed"): "--model.seed: expected a value, got none; write --model.seed=VALUE",
    }.items():
        status, _, err = thundercat(*words)
        assert (status, len(err.splitlines())) == (2, 1)
        assert message in err


def test_completion_offers_commands_options_and_the_fields_of_the_files_given(in_root: Path) -> None:
    from experiments.config.completion import field_names

    names = field_names([TINYCHAT])
    assert {"model.attack.epsilon", "trainer.max_steps"} <= set(names)
    assert not [name for name in names if "init_args" in name or "class_path" in name]
    assert field_names(["nowhere.yaml"]) == []
    assert completed(f"thundercat fit --config {TINYCHAT} --model.attack.num") == "--model.attack.num_steps="
    assert completed("thundercat list at") == "attacks"
    assert completed("thundercat chat runs/x --ckpt_path no") == "none"
    assert completed("thundercat compare runs/x runs/y --stage va") == "validate"


def completed(line: str) -> str:
    """What the shell is offered."""
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    command = [sys.executable, "-m", "experiments.cli"]
    # The answer goes to file descriptor 8.
    done = subprocess.run(
        ["bash", "-c", '"$@" 8>&1 >/dev/null 2>&1', "-", *command],
        cwd=ROOT,
        env=os.environ | shell,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()
