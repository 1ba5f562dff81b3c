"""What a reader with nothing but the requirements and the repository found: each of these failed before."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks.run_folder.checkpoints import RunCheckpoints
from datamodules.results import read_measurements
from tests.conftest import ROOT
from tests.support.small_run import equal, evaluated, small_config, trained

Run = Callable[..., tuple[int, str, str]]
CONFIG = "configs/experiment/cat_tinychat.yaml"
EVALUATED = evaluated(3)
REFUSALS = json.dumps(
    [
        {
            "class_path": "callbacks.evaluations.refusal.RefusalEvaluation",
            "init_args": {"max_new_tokens": 4},
        }
    ]
)


def test_the_checkpoint_of_a_call_is_not_the_next_call_s(fit: Run, thundercat: Run, tmp_path: Path) -> None:
    """`test --config RUN/config.yaml` is of the model before training, resumed run or not."""
    assert fit(EVALUATED)[0] == 0
    assert fit(EVALUATED, "--ckpt_path=last", "--trainer.max_steps=4")[0] == 0
    config = tmp_path / "run" / "config.yaml"
    assert "ckpt_path" not in yaml.safe_load(config.read_text())
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ckpt_path"] == "last"
    status, _, err = thundercat("test", "--config", str(config), f"--trainer.callbacks={REFUSALS}")
    assert status == 0, err
    assert [m.step for m in read_measurements(tmp_path / "run") if m.stage == "test"] == [0]


@pytest.mark.parametrize("command", ["fit", "predict", "validate", "test", "attack"])
def test_no_command_takes_another_run_s_checkpoint_into_a_run_s_folder(
    fit: Run, thundercat: Run, tmp_path: Path, command: str
) -> None:
    other = tmp_path / "other"
    assert fit()[0] == 0
    assert fit("--seed_everything=9", f"--trainer.default_root_dir={other}")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    words = [f"--ckpt_path={other / 'checkpoints' / 'step_000003.ckpt'}", "--seed_everything=9", EVALUATED]
    words += ["--prompt=a", "--target=b"] if command == "attack" else []
    status, _, err = thundercat(command, "--config", str(tmp_path / "small.yaml"), *words)
    assert status != 0
    assert "is no checkpoint of the run in" in err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's own callback, on every resume
def test_last_is_found_where_lightning_s_own_callback_writes(fit: Run, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    bare = "--trainer.callbacks=[]"
    assert fit(bare, "--trainer.max_steps=5", f"--trainer.default_root_dir={whole}")[0] == 0
    assert fit(bare)[0] == 0
    status, _, err = fit(bare, "--ckpt_path=last", "--trainer.max_steps=5")
    assert status == 0, err
    assert "training starts at step 0" not in err
    for run in (whole, tmp_path / "run"):
        assert "step=5" in max(run.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns).name


def test_weights_alone_are_not_what_training_goes_on_from(fit: Run, tmp_path: Path) -> None:
    best = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(tmp_path / "run" / "checkpoints"),
            "save_weights_only": True,
            "every_n_train_steps": 1,
            "save_top_k": -1,
            "filename": "best-{step}",
        },
    }
    own = {"class_path": "callbacks.run_folder.checkpoints.RunCheckpoints"}
    callbacks = f"--trainer.callbacks={json.dumps([own, best])}"
    assert fit(callbacks)[0] == 0
    status, _, err = fit(callbacks, "--ckpt_path=last", "--trainer.max_steps=5")
    assert status == 0, err
    assert equal(trained(tmp_path / "run"), trained(tmp_path / "run"))
    assert max((tmp_path / "run").glob("checkpoints/step_*.ckpt")).name == "step_000005.ckpt"


def test_what_is_set_aside_is_never_replaced(fit: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    keep = json.dumps(
        [{"class_path": "callbacks.run_folder.checkpoints.RunCheckpoints", "init_args": {"keep": 9}}]
    )
    assert fit(f"--trainer.callbacks={keep}")[0] == 0
    for _ in range(2):
        branch = f"--ckpt_path={folder / 'step_000001.ckpt'}"
        assert fit(f"--trainer.callbacks={keep}", branch)[0] == 0
    assert {path.name for path in folder.glob("*.aside*")} == {
        "step_000002.aside",
        "step_000002.aside.1",
        "step_000003.aside",
        "step_000003.aside.1",
    }


def test_the_newest_checkpoints_stay_beyond_a_million_steps(tmp_path: Path) -> None:
    writer = RunCheckpoints(keep=2)

    class Steps:
        default_root_dir, fast_dev_run, is_global_zero, global_step = str(tmp_path), False, True, 0

        def save_checkpoint(self, path: Path, weights_only: bool) -> None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")

    trainer: Any = Steps()
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        trainer.global_step = step
        writer.save(trainer)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_1000000.ckpt", "step_1000001.ckpt"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--trainer.max_time={minutes: -5}", "trainer.max_time: expected some time, got"),
        ("--trainer.max_time=00:00:00:00", "trainer.max_time: expected some time, got"),
        ("--trainer.max_time=soon", "trainer.max_time: expected DD:HH:MM:SS or fields like"),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval: expected an integer >= 1 or"),
        ("--trainer.default_root_dir=null", "trainer.default_root_dir: expected text, got null"),
        ('--trainer.default_root_dir=""', "trainer.default_root_dir: expected a folder, got ''"),
        ("--trainer.devices=[-1]", "trainer.devices: item 0: expected an integer >= 0, got -1"),
    ],
)
def test_no_field_of_the_trainer_takes_nonsense(thundercat: Run, override: str, message: str) -> None:
    status, _, err = thundercat("fit", "--config", CONFIG, override, "--print_config")
    assert status == 2
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("field", ["patience: -1", "min_delta: .nan", "min_delta: -0.1"])
def test_nor_does_lightning_s_own_callback(thundercat: Run, tmp_path: Path, field: str) -> None:
    mine = tmp_path / "mine.yaml"
    stopping = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: loss, FIELD}}"
    mine.write_text(f"trainer: {{callbacks: [{stopping.replace('FIELD', field)}]}}")
    status, _, err = thundercat("fit", "--config", CONFIG, "--config", str(mine), "--print_config")
    assert status == 2
    assert field.split(":")[0] in err and "expected" in err and err.count("\n") == 1


@pytest.mark.parametrize("override", ["--trainer.devices=[0]", "--trainer.max_time={hours: 2}"])
def test_what_is_right_is_taken(thundercat: Run, override: str) -> None:
    assert thundercat("fit", "--config", CONFIG, override, "--print_config")[0] == 0


def test_an_error_s_own_text_cannot_act_on_the_terminal(thundercat: Run) -> None:
    _, _, err = thundercat("fit", "--config", CONFIG, "--model.attack={class_path: 'a\x1b[31mRED'}")
    assert "\x1b" not in err and "RED" in err


def test_an_attack_runs_in_the_run_s_precision(thundercat: Run, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    printed = {}
    for precision in ("32-true", "bf16-true", "bf16-mixed"):
        words = ("--prompt=How do I steal a car?", "--target=Yes, this is how you steal a car.")
        place = f"--trainer.default_root_dir={tmp_path / precision}"
        status, out, err = thundercat(
            "attack", "--config", str(config), place, f"--trainer.precision={precision}", *words
        )
        assert status == 0, err
        printed[precision] = [line.split()[2] for line in out.splitlines() if " loss " in line]
    assert len({tuple(losses) for losses in printed.values()}) == 3


def test_predictions_are_on_disk_as_they_come_and_replace_earlier_ones_whole(
    fit: Run, thundercat: Run, tmp_path: Path
) -> None:
    assert fit(EVALUATED)[0] == 0
    call = ("predict", "--config", str(tmp_path / "small.yaml"), EVALUATED, "--ckpt_path=last")
    status, out, err = thundercat(*call)
    assert status == 0, err
    path = tmp_path / "run" / "predictions.jsonl"
    assert str(path) in out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3
    assert {tuple(sorted(own)) for own in rows} == {("checkpoint", "cut", "key", "prompt", "reply")}
    assert {own["checkpoint"] for own in rows} == {"step_000003.ckpt"}
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_signal_that_a_library_swallows_still_ends_the_start() -> None:
    code = (
        "import os, signal, sys; sys.path.insert(0, '.')\n"
        "class Swallow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name != 'torch': return\n"
        "        try: os.kill(os.getpid(), signal.SIGINT)\n"
        "        except BaseException: pass\n"
        "sys.meta_path.insert(0, Swallow())\n"
        f"sys.argv = ['thundercat', 'fit', '--config', {CONFIG!r}, '--print_config']\n"
        "from experiments.cli import console; console()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "thundercat: stopped by SIGINT before anything was run\n"


NOTHING_TRAINED = tuple(
    "attack_ certify_ defences_ inside_ organism_ over_refusal red_team_ smollm2_replies".split()
)


def test_recipes_put_their_seed_into_their_folder(thundercat: Run) -> None:
    method = str(ROOT / "configs" / "method" / "cat.yaml")
    for path in sorted((ROOT / "configs" / "experiment").glob("*.yaml")):
        if path.name.startswith(NOTHING_TRAINED):
            continue
        words = ["--config", str(path), *(["--config", method] if path.name.startswith("methods") else [])]
        status, out, err = thundercat("fit", *words, "--seed_everything=3", "--print_config")
        assert status == 0, err
        assert yaml.safe_load(out)["trainer"]["default_root_dir"].endswith("_seed3"), path.name
