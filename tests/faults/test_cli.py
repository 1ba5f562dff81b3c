"""Findings of the audit about the command line and configuration."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from lightning import Callback

from experiments.config.classes import import_class, moved_to, project_classes
from experiments.config.errors import ConfigError
from tests.conftest import ROOT
from tests.support.small_run import small_config

Run = Callable[..., tuple[int, str, str]]
TINYCHAT = "configs/experiment/cat_tinychat.yaml"


# --- B: errors are one line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--ckpt_path=true", "ckpt_path: expected text or null, got true"),
        (
            "--data.evaluation.harmless.0.categories.0.foo=.inf",
            "--data.evaluation.harmless.0.categories.0.foo: '0' is a plain value ('guide'), so nothing below",
        ),
        ("--trainer.max_steps=-5", "trainer.max_steps: expected an integer >= -1, got -5"),
        ("--trainer.devices=0", "trainer.devices: expected an integer >= 1 or "),
        ("--trainer.accelerator=gpuu", "trainer.accelerator: expected 'auto' | 'gpu'"),
        (
            "--trainer.gradient_clip_val=-1",
            "trainer.gradient_clip_val: expected a number >= 0 or null, got -1",
        ),
        ("--trainer.limit_test_batches=-1", "trainer.limit_test_batches: expected an integer >= 0 or "),
        (
            "--trainer.callbacks=3",
            "trainer.callbacks: expected a list of (class_path and init_args (Callback)) or ",
        ),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches: expected an integer >= 1"),
        ("--seed_everything=true", "seed_everything: expected an integer within [0, 4294967295], got true"),
        ("--seed_everything=-1", "seed_everything: expected an integer within [0, 4294967295], got -1"),
        ("--model.optimizer.lr=.inf", "model.optimizer.lr: expected a finite number, got inf"),
        (
            "--model.objective.cutoff_away=.nan",
            "model.objective.cutoff_away: expected a finite number, got nan",
        ),
        ("--model.base.config={a: .nan}", "model.base.config.a: expected a finite number, got nan"),
        ("--model.attack.init_args=3", "model.attack: expected fields, got 3"),
    ],
)
def test_b_wrong_values_are_one_line(override: str, message: str, thundercat: Run) -> None:
    status, _, err = thundercat("fit", "--config", TINYCHAT, override)
    assert status == 2
    assert err.startswith(f"thundercat: {message}"), err
    assert len(err.splitlines()) == 1


def test_b_a_class_without_arguments_takes_none(thundercat: Run) -> None:
    override = "--model.attack={class_path: lightning_modules.attacks.base.NoAttack, init_args: {x: 1}}"
    _, _, err = thundercat("fit", "--config", TINYCHAT, override)
    assert err.startswith("thundercat: model.attack.x: unknown field")


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_b_a_logger_whose_package_is_missing(
    name: str, thundercat: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.config.extras.find_spec", lambda name: None)
    status, _, err = thundercat(
        "fit", "--config", TINYCHAT, "--config", f"configs/trainer/{name}.yaml", "--print_config"
    )
    assert status == 2
    assert err.startswith("thundercat: trainer.logger.0: ")
    assert f"needs {name}, which is not installed; pip install {name} (the project's extra `{name}`)" in err
    assert len(err.splitlines()) == 1


def test_b_attack_honours_traceback(thundercat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("broken\ninside")

    monkeypatch.setattr("experiments.commands.attack.attack", broken)
    words = ("attack", "--config", TINYCHAT, "--prompt", "a", "--target", "b")
    status, _, err = thundercat(*words)
    assert status == 1
    assert (
        err == "thundercat: unexpected error RuntimeError: broken; run again with --traceback to see where\n"
    )
    status, _, err = thundercat(*words, "--traceback")
    assert status == 1
    assert "in broken" in err
    assert err.splitlines()[-1] == "thundercat: unexpected error RuntimeError: broken"


class Breaks(Callback):
    """Something that nobody foresaw, in the middle of a training."""

    def on_train_batch_end(self, *_: object) -> None:
        _ = [][0]


def test_where_an_unforeseen_error_came_from_is_kept(thundercat: Run, tmp_path: Path) -> None:
    """It may have come after hours."""
    breaks = {"class_path": "tests.faults.test_cli.Breaks"}
    (tmp_path / "breaks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [breaks]}}))
    words = ("fit", "--config", str(small_config(tmp_path)), "--config", str(tmp_path / "breaks.yaml"))
    status, _, err = thundercat(*words)
    kept = tmp_path / "run" / "traceback.txt"
    assert status == 1
    assert err.splitlines()[-1] == (
        "thundercat: unexpected IndexError: list index out of range; run again with --traceback to see "
        f"where, or read {kept}"
    )
    assert "in on_train_batch_end" in kept.read_text()


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGINT, "stopped by SIGINT"), (signal.SIGTERM, "stopped by SIGTERM")],
)
def test_b_a_signal_at_start_up_is_one_line(number: signal.Signals, words: str) -> None:
    command = [sys.executable, "-m", "experiments.cli", "fit", "--config", TINYCHAT, "--print_config"]
    # As soon as the heavy imports have begun.
    code = (
        "import os, signal, sys; sys.path.insert(0, '.')\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'torch': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"sys.argv = {command[2:]!r}\n"
        "from experiments.cli import console; console()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number
    assert done.stderr == f"thundercat: {words} before anything was run\n"


def test_b_a_yaml_that_gives_a_key_twice_loses_nothing_in_silence(thundercat: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer:\n  max_steps: 1\n  max_steps: 2\n")
    _, _, err = thundercat("fit", "--config", TINYCHAT, "--config", str(tmp_path / "mine.yaml"))
    assert "mine.yaml:3: not valid YAML: key 'max_steps' is given twice; remove one" in err


# --- class paths


OLD = json.loads((Path(__file__).parent / "old_class_paths.json").read_text())
"""Every public class of the first revision."""


@pytest.mark.parametrize("path", OLD)
def test_e_an_old_class_path_is_still_right_or_says_where_the_class_is(path: str) -> None:
    name = path.rpartition(".")[2]
    new = moved_to(name)
    assert new is not None, f"{name} is gone: say what stands in its place in experiments/config/classes.py"
    found = None
    with contextlib.suppress(ConfigError):
        found = import_class("model", path)
    if found is None:
        with pytest.raises(ConfigError, match=f"^model.class_path: {path} moved to {new}; write that$"):
            import_class("model", path)
    else:
        assert found.__name__ == name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("datamodules.sources.tinychat.TinyChatHarmful", "TinyChatHarmful"),
        ("datamodules.sources.tinychat.TinyChatBenign", "TinyChatBenign"),
        ("datamodules.sources.organism.sources.OrganismHarmful", "TinyChatHarmful"),
        ("datamodules.sources.organism.sources.OrganismBenign", "TinyChatBenign"),
    ],
)
def test_e_class_paths_of_both_editions_of_the_corpus_say_where_the_class_is(path: str, name: str) -> None:
    new = f"datamodules.sources.tinychat.sources.{name}"
    with pytest.raises(ConfigError, match=f"^data.class_path: {path} moved to {new}; write that$"):
        import_class("data", path)


def test_e_class_names_are_unique() -> None:
    # A class that moved is found by its name.
    assert len(set(project_classes().values())) == len(project_classes()) > 100


def test_e_modules_of_the_working_directory_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "my_attacks.py").write_text(
        "from lightning_modules.attacks.base import NoAttack\n\n\nclass Mine(NoAttack):\n    '''Nothing.'''\n"
    )
    # As the console script does it: the working directory is not on the path by itself.
    code = "import sys; from experiments.cli import main; sys.path.remove(''); sys.exit(main(sys.argv[1:]))"
    words = ["fit", "--config", TINYCHAT, "--model.attack=my_attacks.Mine", "--print_config"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["init_args"]["attack"] == {"class_path": "my_attacks.Mine"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--trainer.strategy=fsdp", "trainer.strategy: 'fsdp' is not supported"),
        ("--trainer.strategy=deepspeed", "trainer.strategy: 'deepspeed' is not supported"),
        (
            "--model.base=null",
            "takes its value from model.init_args.base.name_or_path, but model.init_args.base is no",
        ),
    ],
)
def test_b_what_third_parties_would_say_is_said_with_field_and_remedy(
    thundercat: Run, override: str, message: str
) -> None:
    status, _, err = thundercat("fit", "--config", TINYCHAT, override, "--print_config")
    assert status == 2
    assert message in err and err.count("\n") == 1
