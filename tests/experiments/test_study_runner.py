"""A study's runs as processes of a program that behaves as it is told: failing, slow, done before, ended by a
signal."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from callbacks.run_folder.stopping import Stopped
from experiments.commands.study import Runner
from experiments.studies.scheduling import DONE, Job, threads

PROGRAM = """
import pathlib, sys, time
command, name, *words = sys.argv[1:]
with open("calls.txt", "a") as stream:
    stream.write(f"{command} {name}\\n")
if "slow" in words:
    time.sleep(60)
if command in words:
    sys.exit("thundercat: broken on purpose")
"""


def job(name: str, *words: str, needs: tuple[tuple[str, int], ...] = ()) -> Job:
    return Job(name, 0, Path(name), ("fit", name, *words), ("test", name, *words), needs, " ".join(words))


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    return sys.executable, str(tmp_path / "program.py")


def calls() -> list[str]:
    return Path("calls.txt").read_text().splitlines()


def test_a_failing_run_is_told_and_stops_no_other(program: tuple[str, ...]) -> None:
    jobs = [
        job("a", "fit"),
        job("b", needs=(("a", 0),)),
        job("c", "test"),
        job("d", needs=(("e", 0),)),
        job("e"),
    ]
    failed = Runner(jobs, 2, program).run()
    assert failed == {
        "a, seed 0": "fit ended with status 1: broken on purpose (a/log.txt)",
        "b, seed 0": "it needs a, seed 0, which failed",
        "c, seed 0": "test ended with status 1: broken on purpose (c/log.txt)",
    }
    assert sorted(calls()) == ["fit a", "fit c", "fit d", "fit e", "test c", "test d", "test e"]
    assert calls().index("test e") < calls().index("fit d")
    assert [own.state() for own in jobs] == ["begun", "not begun", "to be judged", "done", "done"]
    # Again: what is done is not repeated, what failed is.
    Path("calls.txt").unlink()
    Runner([job("c"), job("d"), job("e", "other evaluation")], 1, program).run()
    assert calls() == ["test c", "test e"]


def test_what_was_done_before_takes_none_of_the_time_left(
    program: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    Runner([job("a"), job("b")], 1, program).run()
    capsys.readouterr()
    Runner([job("a"), job("b"), job("c"), job("d")], 1, program).run()
    counted = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines() if " of " in line]
    assert counted == ["study: 3 of 4 runs", "study: 4 of 4 runs"]


def test_what_reads_another_run_waits_for_its_evaluation_too(program: tuple[str, ...]) -> None:
    """It may read the rows."""
    Path("e").mkdir()
    job("e").finish("fit")
    Runner([job("d", needs=(("e", 0),)), job("e")], 1, program).run()
    assert calls() == ["test e", "fit d", "test d"]


def test_a_damaged_note_is_none(program: tuple[str, ...]) -> None:
    Runner([job("a")], 1, program).run()
    (Path("a") / DONE).write_text("{")
    assert job("a").state() == "begun"
    (Path("a") / DONE).write_text("[]")
    assert job("a").state() == "begun"


def slow_study(program: tuple[str, ...], said: Connection) -> None:
    """A study whose one run does not end by itself, and what it says when it is ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        Runner([Job("a", 0, Path("a"), ("fit", "a", "slow"), ("test", "a"), (), "")], 1, program).run()
    except Stopped as stop:
        said.send(str(stop))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runs_and_the_study(number: signal.Signals, program: tuple[str, ...]) -> None:
    # A process of its own, with what this one has imported.
    reading, writing = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=slow_study, args=(program, writing))
    process.start()
    until = time.monotonic() + 60
    while not Path("calls.txt").is_file() and time.monotonic() < until:
        time.sleep(0.1)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert reading.poll(30)
    assert reading.recv().startswith("stopped by ") and calls() == ["fit a"]
    process.join(30)
    assert process.exitcode == 0
    assert job("a").state() == "begun"


def test_runs_side_by_side_share_the_cores_that_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 4, 6}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads(workers) for workers in (1, 2, 9)] == [4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [threads(workers) for workers in (1, 2)] == [2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads(1) == 4
