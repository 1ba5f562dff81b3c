"""`make smollm2` with stand-ins for what it starts: what it asks for, in which order, what it says first."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
SOURCES = (
    *("setup.cfg", "pyproject.toml", "constraints.txt", ".venv/.installed", ".venv/.installed-smollm2"),
    *("configs/experiment/smollm2_replies.yaml", "configs/experiment/smollm2_aligned.yaml"),
    "configs/data/smollm2.yaml",
)
REPLIES = "runs/smollm2_replies/predictions.jsonl"
MODEL = "runs/smollm2_aligned_seed0/model_merged/config.json"
STAND_IN = f"""#!/bin/sh
echo "$*" >> calls
case "$*" in
  predict*) mkdir -p runs/smollm2_replies; echo > {REPLIES};;
  *smollm2_aligned.yaml*) mkdir -p $(dirname {MODEL}); echo > {MODEL};;
esac
case "$*" in "$KILLED"*) kill -$SIGNAL $PPID; sleep 1;; esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout in which everything is installed and nothing is trained."""
    for age, name in enumerate(SOURCES):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        os.utime(path, (1000 + age, 1000 + age))
    shutil.copy(ROOT / "Makefile", tmp_path)
    program = tmp_path / ".venv" / "bin" / "thundercat"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    needed = (ROOT / "Makefile").read_text(encoding="utf-8").partition("SMOLLM2_DATA := ")[2]
    for name in re.findall(r"[\w/-]+\.(?:jsonl?|csv)", needed.partition("smollm2-checks:")[0]):
        below = "" if name.split("/")[0] in ("alpaca", "dolly", "advbench", "cat_official") else "harmbench/"
        data = tmp_path / "given" / "data" / f"{below}{name}"
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("")
    return tmp_path


def made(tree: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = re.compile("MAKE|MFLAGS|OMP_|PROCESSES|VENV|BF16|PYTHON$")
    variables = {name: text for name, text in os.environ.items() if not own.match(name)}
    variables |= {"THUNDERCAT_DATA": str(tree / "given"), "KILLED": "nothing", "SIGNAL": "TERM"} | environment
    return subprocess.run(["make", *words], cwd=tree, capture_output=True, text=True, env=variables)


def stages(tree: Path) -> list[str]:
    """What was asked for since this was asked last."""
    calls = tree / "calls"
    lines = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return [re.findall(r"experiment/(\w+)\.yaml", line)[0] for line in lines]


ALL = ["smollm2_replies", "smollm2_aligned", "cat_smollm2"]


def test_stages_come_in_their_order_and_once(tree: Path) -> None:
    assert made(tree, "smollm2").returncode == 0
    assert stages(tree) == ALL
    assert made(tree, "smollm2").returncode == 0
    assert stages(tree) == ALL[2:]


@pytest.mark.parametrize(
    ("changed", "again"),
    [(SOURCES[-3], ALL), (SOURCES[-2], ALL[1:]), (SOURCES[-1], ALL[1:]), (REPLIES, ALL[1:])],
)
def test_a_newer_recipe_asks_for_its_stage_again(tree: Path, changed: str, again: list[str]) -> None:
    made(tree, "smollm2")
    stages(tree)
    os.utime(tree / changed, (2**31, 2**31))
    made(tree, "smollm2")
    assert stages(tree) == again


@pytest.mark.parametrize(("stopped", "signal"), [("predict", "TERM"), ("fit", "TERM"), ("fit", "KILL")])
def test_what_was_finished_stays_and_the_stage_is_ended(tree: Path, stopped: str, signal: str) -> None:
    assert made(tree, "smollm2", KILLED=stopped, SIGNAL=signal).returncode
    assert (tree / REPLIES).exists()
    assert (tree / MODEL).exists() == (stopped == "fit")
    stages(tree)
    made(tree, "smollm2")
    assert stages(tree) == ALL[1:]


def test_a_start_that_is_gone_is_not_trained_from(tree: Path) -> None:
    made(tree, "smollm2")
    stages(tree)
    (tree / MODEL).unlink()
    done = made(tree, "smollm2")
    assert done.returncode and "is gone" in done.stderr and stages(tree) == []


@pytest.mark.parametrize("parallel", [[], ["-j2"]])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"PROCESSES": "0"}, "PROCESSES: expected 1 or 2"),
        ({"PROCESSES": "3"}, "PROCESSES: expected 1 or 2"),
        ({"PROCESSES": ""}, "PROCESSES: expected 1 or 2"),
        ({"THUNDERCAT_DATA": "nowhere"}, "nowhere/data/alpaca/alpaca_5000.json is missing"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_installed(
    tree: Path, given: dict[str, str], said: str, parallel: list[str]
) -> None:
    shutil.rmtree(tree / ".venv")
    words = [f"{name}={text}" for name, text in given.items()]
    done = made(
        tree, *parallel, "smollm2", *words, THUNDERCAT_DATA=given.get("THUNDERCAT_DATA", str(tree / "given"))
    )
    assert done.returncode and said in done.stderr
    assert not (tree / ".venv").exists()


def test_every_file_that_the_recipes_read_is_looked_for(tree: Path) -> None:
    names = [path for path in (tree / "given").rglob("*") if path.is_file()]
    assert len(names) == 8
    for path in names:
        path.rename(path.with_suffix(".away"))
        assert f"{path.name} is missing" in made(tree, "smollm2").stderr
        path.with_suffix(".away").rename(path)


def test_one_process_needs_no_engine_for_several(tree: Path) -> None:
    made(tree, "smollm2", "PROCESSES=1")
    calls = (tree / "calls").read_text(encoding="utf-8")
    assert "ddp.yaml" not in calls and calls.count("--trainer.devices=1") == 2


def test_threads_asked_for_do_not_hide_cores(tree: Path) -> None:
    # nproc answers with OMP_NUM_THREADS where that is set.
    plans = [made(tree, "-n", "smollm2", **threads).stdout for threads in ({}, {"OMP_NUM_THREADS": "1"})]
    assert plans[0] == plans[1] and "--trainer.devices=" in plans[0]


def test_an_older_python_makes_no_environment(tree: Path) -> None:
    older = tree / "python3"
    older.write_text(
        '#!/bin/sh\ncase "$1" in -c) echo "expected 3.11" >&2; exit 1;; *) mkdir -p "$3";; esac\n'
    )
    older.chmod(0o755)
    done = made(tree, "env/.installed", "VENV=env", f"PYTHON={older}")
    assert done.returncode and "expected 3.11" in done.stderr and not (tree / "env").exists()
