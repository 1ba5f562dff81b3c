"""The command line as a user meets it: composition, overrides, errors with field and remedy, help, every
recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks.report.training_log import read_training_log
from experiments.commands.run import instantiate
from experiments.config.check import check, check_precision
from experiments.config.compose import ConfigError, compose, merge
from experiments.config.defaults import with_defaults
from tests.conftest import ROOT

Run = Callable[..., tuple[int, str, str]]
TINYCHAT = "configs/experiment/cat_tinychat.yaml"
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "configs" / "quickstart.yaml", *(ROOT / "configs" / "experiment").glob("*.yaml")]
)
SHORT = (
    "--trainer.max_steps=2",
    "--data.harmful_per_step=2",
    "--data.utility_per_step=2",
    "--model.attack.num_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
)


ATTACK_FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs" / "attack").glob("*.yaml"))


@pytest.mark.parametrize("file", ATTACK_FILES)
def test_every_attack_file_can_be_put_into_a_recipe(file: str, in_root: Path) -> None:
    config = compose([TINYCHAT, file], [])
    check(config, "test")
    attack = instantiate(with_defaults(config)).model.attack
    assert callable(attack)


# --- composition


def test_later_files_win_lists_are_replaced_or_extended_and_a_new_class_drops_old_arguments() -> None:
    base = {"a": {"class_path": "x.A", "init_args": {"p": 1}}, "l": [1], "k": 1}
    over = {"a": {"class_path": "x.B"}, "l+": [2], "k": 2}
    assert merge(base, over) == {"a": {"class_path": "x.B"}, "l": [1, 2], "k": 2}
    assert merge(base, {"a": {"class_path": "x.A", "init_args": {"q": 2}}})["a"]["init_args"] == {
        "p": 1,
        "q": 2,
    }
    assert merge(merge({"l+": [2]}, {"l+": [3]}), {"l": [0]}) == {"l": [0]}
    assert base["l"] == [1]


def test_interpolation_is_resolved_after_overrides(in_root: Path) -> None:
    # LightningCLI's own omegaconf mode keeps the stale value here.
    config = compose(
        [TINYCHAT], [("model.base.name_or_path", "tinychat:helpful"), ("data.micro_batches", "2")]
    )
    assert config["data"]["init_args"]["tokenizer"]["name_or_path"] == "tinychat:helpful"
    assert config["trainer"]["accumulate_grad_batches"] == 2
    assert "vars" not in config


def test_overrides_step_through_init_args_and_lists(in_root: Path) -> None:
    overrides = [
        ("model.attack.epsilon", "2e-1"),
        ("model.attack.init_args.num_steps", "3"),
        ("data.evaluation.utility.0.num_rows", "7"),
        ("model.objective.cutoff_away", "null"),
    ]
    config = compose([TINYCHAT], overrides)
    attack = config["model"]["init_args"]["attack"]["init_args"]
    assert (attack["epsilon"], attack["num_steps"]) == (0.2, 3)
    assert config["data"]["init_args"]["evaluation"]["utility"][0]["init_args"]["num_rows"] == 7
    assert config["model"]["init_args"]["objective"]["init_args"]["cutoff_away"] is None


def test_a_short_class_name_replaces_the_class(in_root: Path) -> None:
    config = compose([TINYCHAT], [("model.attack", "NoAttack")])
    assert config["model"]["init_args"]["attack"] == {"class_path": "lightning_modules.attacks.base.NoAttack"}
    check(config, "fit")


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


# --- every recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds(
    recipe: str, in_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = [("trainer.default_root_dir", str(tmp_path))]
    if "zephyr" in recipe:  # bitsandbytes is an extra
        overrides += [("model.base.quantization", "null"), ("trainer.precision", "bf16-mixed")]
    # The methods' common settings want a method.
    method = ["configs/method/cat.yaml"] if "/methods_" in recipe else []
    config = compose([recipe, *method], overrides)
    check(config, "fit")
    cli = instantiate(with_defaults(config))
    # Recipes for `thundercat test` train nothing.
    assert cli.trainer.max_steps > 0 or "thundercat test --config" in (ROOT / recipe).read_text()
    assert not hasattr(cli.model, "model")  # nothing is loaded yet


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "experiment" in r])
def test_every_recipe_has_a_header(recipe: str, in_root: Path) -> None:
    assert (ROOT / recipe).read_text().startswith("# ")


# --- errors


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.attack.epslion=0.1", "model.attack.epslion: unknown field, did you mean 'epsilon'?"),
        ("--model.attack.epsilon=abc", "model.attack.epsilon: expected float or null, got 'abc'"),
        (
            "--model.attack.epsilon=0",
            "EmbeddingPGD.epsilon: expected > 0, got 0.0; set a positive radius, or attack: NoAttack",
        ),
        ("--model.attack.num_steps=0", "EmbeddingPGD.num_steps: expected >= 1, got 0"),
        (
            "--model.attack.step_rule=newton",
            "model.attack.step_rule: expected 'sign' | 'l2' | 'adam', got 'newton'",
        ),
        ("--model.objective.cutoff_away=5", "TowardAwayUtility.cutoff_away: expected <= 0"),
        ("--model.objective.cutoff_toward=-1", "TowardAwayUtility.cutoff_toward: expected >= 0"),
        ("--model.attack=EmbeddingPGDD", "class 'EmbeddingPGDD': not found beside"),
        (
            "--model.attack.class_path=lightning_modules.attacks.embedding.pgd.PGD",
            "no class 'PGD' in lightning_modules.attacks.embedding.pgd",
        ),
        ("--model.base.dtyp=float32", "model.base.dtyp: unknown field, did you mean 'dtype'?"),
        ("--model.base.lora.r=-1", "base.lora.r: expected >= 1, got -1"),
        ("--model.optimizer=3", "model.optimizer: expected fields of OptimizerConfig, got 3"),
        ("--model.optimizer.lr=0", "optimizer.lr: expected > 0, got 0"),
        ("--trainer.max_step=3", "trainer.max_step: unknown field, did you mean 'max_steps'?"),
        ("--trainer.precision=16-mixed", "trainer.precision: '16-mixed' needs a GPU"),
        ("--data.harmful_per_step=x", "data.harmful_per_step: expected int, got 'x'"),
        ("--data.micro_batches=3", "data.harmful_per_step: expected a multiple of micro_batches 3, got 8"),
        ("--modell.x=1", "modell: unknown field, did you mean 'model'?"),
        ("--ckpt_path=nowhere.ckpt", "ckpt_path: no file 'nowhere.ckpt'"),
        ("--data.seed.x=1", "data.seed.x: expected int or null at data.seed, got fields"),
        ("--model.base.quantization=nf4", "base.quantization: expected base.lora to be set"),
        (
            "--data.encoding.attackable=everything",
            "data.encoding.attackable: expected 'user' | 'prompt', got 'everything'",
        ),
        ("--trainer.callbacks.4.limit=ten", "trainer.callbacks.4.limit: expected int or null, got 'ten'"),
        ("--trainer.callbacks.99.limit=1", "expected a number below"),
        ("--data.encoding.max_length=${nowhere}", "Interpolation key 'nowhere' not found"),
        (
            "--vars.gcg_limits=1",
            "vars.gcg_limits: unknown variable, did you mean 'gcg_limit'?; these files use: ",
        ),
        ("naked", "expected an option, got 'naked'; files are given with --config"),
    ],
)
def test_errors_name_field_and_remedy_before_a_model_is_loaded(
    override: str, message: str, thundercat: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lightning_modules.base.load_seeded", never)
    status, _, err = thundercat("fit", "--config", TINYCHAT, "--trainer.accelerator=cpu", override)
    assert status == 2
    assert message in err
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
    assert "no evaluations.jsonl" in thundercat("report", str(tmp_path))[2]


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
    assert "expected > 0, got -1" in done.stderr
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


def test_four_bit_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_modules.models.loading import LoraSettings, ModelConfig

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"nf4 needs bitsandbytes, which is not installed; pip install 'thundercat\[4bit\]'"
    ):
        ModelConfig("x", lora=LoraSettings(), quantization="nf4")


# --- help


def test_help(thundercat: Run) -> None:
    assert "--print_config" in thundercat("--help")[1]
    status, out, _ = thundercat("fit", "--config", TINYCHAT, "--help")
    assert status == 0
    assert "epsilon (float | None, default 0.05): radius of the ball in `radius_unit`" in out
    assert "base.lora.r (int, default 64): Rank." in out
    assert "harmful_per_step (NonNegativeInt, default 8): harmful rows per optimiser step" in out
    assert "num_tokens" in thundercat("fit", "--help.SoftPrompt")[1]
    assert "no such class" in thundercat("fit", "--help.Nothing")[2]


def test_every_field_of_the_recipes_classes_is_documented(in_root: Path) -> None:
    from experiments.config.help import _classes, fields

    missing = []
    for recipe in RECIPES:
        for path, cls in _classes(compose([recipe], [])):
            if not cls.__module__.startswith("lightning.pytorch"):
                missing += [
                    f"{cls.__name__}.{name} ({path})" for name, _, _, text in fields(cls) if not text.strip()
                ]
    assert not missing


# --- whole runs


FEW = ("--vars.evaluation_limit=4", "--vars.gcg_limit=2", "--vars.gcg_steps=2", "--vars.gcg_width=4")


def short(folder: Path, *more: str) -> tuple[str, ...]:
    """The tiny recipe, shortened."""
    return ("fit", "--config", TINYCHAT, f"--trainer.default_root_dir={folder}", *SHORT, *FEW, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a shortened recipe."""
    from experiments.cli import main

    folder = tmp_path_factory.mktemp("quickstart")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        assert main(short(folder)) == 0
    finally:
        os.chdir(before)
    return folder


def test_shortened_quickstart_reports_every_promised_figure(tmp_path: Path, thundercat: Run) -> None:
    steps = [f"--model.attack.attacks.{i}.num_steps=1" for i in (0, 1)]
    arguments = [word for word in SHORT if not word.startswith("--model.attack")]
    status, out, err = thundercat(
        "fit",
        "--config",
        "configs/quickstart.yaml",
        f"--trainer.default_root_dir={tmp_path}",
        *arguments,
        *steps,
        *FEW,
    )
    assert status == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    for snapshot in ("before", "after"):
        assert (
            results[snapshot]["n"]["gcg_attack_success_rate"]
            == results[snapshot]["n"]["worst_case_attack_success_rate"]
            == 2
        )
        for name in ("direct", "initial_suffix", "embedding", "soft_prompt"):
            assert results[snapshot]["n"][f"{name}_attack_success_rate"] == 4
    assert "| gcg attack success rate |" in out


def test_a_run_writes_its_results(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    names = {
        "harmful_refusal_rate", "over_refusal_rate", "utility_exact_match", "embedding_attack_success_rate",
        "soft_prompt_attack_success_rate",
    }  # fmt: skip
    for snapshot in ("before", "after"):
        for name in names:
            rate, (low, high) = results[snapshot][name], results[snapshot]["interval"][name]
            assert 0 <= low <= rate <= high <= 1
            assert results[snapshot]["n"][name] == 4
    cost = results["cost"]
    assert (cost["attack_forward_per_example"], cost["attack_backward_per_example"], cost["steps"]) == (
        1,
        1,
        2,
    )
    # 2 steps x (2 adversarial x (1 + 1 + 4) + 2 utility x 2)
    assert cost["passes"] == 32
    for name in (
        "report.md",
        "report.html",
        "config.yaml",
        "environment.json",
        "csv/metrics.csv",
        "model/model.safetensors",
        "checkpoints/last.ckpt",
    ):
        assert (finished / name).is_file(), name
    assert (finished / "report.html").read_text().count("data:image/png") >= 3
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["seed"] == 0
    assert {"git", "hardware"} <= set(environment)


def test_validate_test_predict_and_report_of_that_run(finished: Path, thundercat: Run) -> None:
    own = (
        "--config",
        str(finished / "config.yaml"),
        "--data.evaluation.harmful.0.limit=3",
        "--data.evaluation.utility.0.num_rows=3",
    )
    own += (
        "--data.evaluation.harmless.0.num_rows=3",
        "--ckpt_path=last",
        "--trainer.callbacks.6.attacks.soft_prompt.num_steps=2",
    )
    own += ("--trainer.callbacks.6.attacks.embedding.num_steps=2",)
    for command in ("validate", "test"):
        status, out, err = thundercat(command, *own)
        assert status == 0, err
        assert "embedding attack success rate" in out
    status, out, _ = thundercat("predict", *own)
    assert status == 0
    rows = [json.loads(line) for line in Path(out.strip().splitlines()[-1]).read_text().splitlines()]
    assert {"key", "prompt", "reply"} == set(rows[0])
    status, out, _ = thundercat("report", str(finished))
    assert status == 0
    assert "| embedding attack success rate |" in out


def test_killed_run_resumes_to_the_same_weights(finished: Path, tmp_path: Path) -> None:
    # kill -9 in the middle of training; the rerun with --ckpt_path last ends bit for bit where an undisturbed
    # run ends.
    def command(folder: Path, *more: str) -> list[str]:
        arguments = (
            *short(
                folder,
                "--trainer.max_steps=6",
                "--trainer.callbacks.4.at_start=false",
                "--trainer.callbacks.5.at_start=false",
            ),
            *more,
        )
        quiet = (
            "--trainer.callbacks.6.at_start=false",
            "--trainer.callbacks.6.attacks.soft_prompt.num_steps=2",
        )
        return [sys.executable, "-m", "experiments.cli", *arguments, *quiet]

    settings: dict[str, Any] = {
        "cwd": ROOT,
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
    }
    subprocess.run(command(tmp_path / "whole"), check=True, **settings)
    process = subprocess.Popen(command(tmp_path / "killed"), **settings)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert last.exists()
    evaluations = tmp_path / "killed" / "evaluations.jsonl"
    evaluations.write_text('{"name": "utility", "stage": "fit", "step": 0, "metrics": {}, "details": {}}\n')
    subprocess.run(command(tmp_path / "killed", "--ckpt_path=last"), check=True, **settings)
    # The record goes on: the evaluation before the kill and the log's first rows are still there.
    assert json.loads(evaluations.read_text().splitlines()[0])["step"] == 0
    steps = [int(row["step"]) for row in read_training_log(tmp_path / "killed")]
    assert sorted(set(steps)) == list(range(6))
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "killed")
    ]
    assert states[0]["global_step"] == states[1]["global_step"] == 6
    assert all(
        torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items()
    )
