"""Sweeps at work: trials as processes of a program that behaves as it is told, killed, failing, lagging."""

from __future__ import annotations

import _thread
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from callbacks.run_folder.lock import RunLock
from callbacks.run_folder.stopping import Stopped
from experiments.config.errors import ConfigError
from experiments.studies.processes import LOG, Resumable
from experiments.studies.scheduling import DONE
from experiments.sweeps import engine as engine_module
from experiments.sweeps.backends import Slurm
from experiments.sweeps.search import COMMAND, ERROR, FOLDER, JOURNAL
from experiments.sweeps.sweep_report import write_sweep
from experiments.sweeps.trials import TRIALS
from tests.support.sweeping import Sweeping, parameters, states


@pytest.fixture
def sweeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeping:
    monkeypatch.chdir(tmp_path)
    return Sweeping(tmp_path)


def test_a_failing_trial_is_recorded_and_the_best_that_keeps_the_constraints_is_tested_once(
    sweeping: Sweeping,
) -> None:
    foreign = sweeping.place / TRIALS / "somebodys" / "model"
    foreign.mkdir(parents=True)
    settings = {
        "parameters": parameters(["works", "fails"], [0.3, 0.5, 0.9]),
        "constraints": [{"column": "utility", "falls_at_most": 0.3}],
        "figures": [{"x": "utility", "y": "embedding"}],
        "keep": 1,
    }
    engine = sweeping.engine(workers=2, **settings)
    engine.run()
    assert engine.judge() is None
    assert states(engine) == ["COMPLETE"] * 3 + ["FAIL"] * 3
    error = engine.search.trials()[3].user_attrs[ERROR]
    assert error.startswith("fit ended with status 1: broken on purpose (") and error.endswith("log.txt)")
    # The most robust one breaks the constraint.
    best = engine.search.best()
    assert best is not None and (best.number, best.value) == (1, pytest.approx(0.5))
    assert sorted(sweeping.calls()) == sorted([*(f"fit trial_{i:04d}" for i in range(6)), "test trial_0001"])
    # Disk: the best keeps its model, the others their results, and what is not ours is left alone.
    models = sorted(path.parent.name for path in (sweeping.place / TRIALS).glob("*/model"))
    assert models == ["somebodys", best.user_attrs[FOLDER]]
    assert len([*(sweeping.place / TRIALS).glob("trial_*/rows")]) == 3
    # Again: nothing is repeated.
    Path("calls.txt").write_text("")
    again = sweeping.engine(**settings)
    again.run()
    assert again.judge() is None and sweeping.calls() == []
    text = write_sweep(again.search, "x", sweeping.place)
    assert (
        "trial 1 is the best on validation (grid, minimize embedding). 6 of 6 trials: 3 complete, 3 failed"
        in text
    )
    assert "| embedding | 80 % | 50 % [23.7, 76.3] (n = 10) | 50 % [23.7, 76.3] (n = 10) |" in text
    assert "| 2 | breaks: utility falls at most 0.3 | works | 0.9 |" in text
    assert "| 3 | failed: fit ended with status 1: broken on purpose (" in text
    assert "On the front: trials 1, 0." in (sweeping.place / "pareto_0.svg").read_text()
    assert (sweeping.place / "parallel.svg").is_file() and (sweeping.place / "report.html").is_file()
    lines = (sweeping.place / "trials.csv").read_text().splitlines()
    assert lines[0].startswith("trial,state,feasible,vars.method,vars.epsilon,embedding: before,")
    assert lines[3].startswith('2,complete,False,"""works""",0.9,0.8,0.1,')
    # A best trial whose model an earlier search has removed is trained again.
    shutil.rmtree(sweeping.place / TRIALS / best.user_attrs[FOLDER] / "checkpoints")
    (sweeping.place / TRIALS / best.user_attrs[FOLDER] / DONE).write_text('{"fit": true}')
    assert again.judge() is None and sweeping.calls() == ["fit trial_0001", "test trial_0001"]


def test_nothing_is_best_where_nothing_keeps_the_constraints(sweeping: Sweeping) -> None:
    engine = sweeping.engine(
        parameters=parameters(["works"], [0.3, 0.5]), constraints=[{"column": "utility", "at_most": 0.5}]
    )
    engine.run()
    assert engine.judge() is None and engine.search.best() is None
    for name in ("best.yaml", "best_config.yaml"):
        (sweeping.place / name).write_text("of an earlier best\n")
    assert "no trial is the best: none keeps them" in write_sweep(engine.search, "x", sweeping.place)
    assert not [*sweeping.place.glob("best*.yaml")]


def test_trials_with_the_same_values_share_one_training(sweeping: Sweeping) -> None:
    engine = sweeping.engine(workers=2, method="random", run_cap=4, parameters=parameters(["works"], [0.5]))
    engine.run()
    assert states(engine) == ["COMPLETE"] * 4
    assert sweeping.calls() == ["fit trial_0000"]


def test_what_a_kill_let_be_noted_half_is_noted_whole(sweeping: Sweeping) -> None:
    settings = {
        "parameters": parameters(["works"], [0.5]),
        "constraints": [{"column": "utility", "at_least": 0.5}],
    }
    engine = sweeping.engine(**settings)
    trial = engine.search.begin()
    engine.search.drawn(trial)
    trial.set_constraint("utility at least 0.5", -0.3)
    again = sweeping.engine(**settings)
    again.run()
    assert states(again) == ["COMPLETE"] and again.search.best() is not None


def test_no_further_trial_is_begun_once_the_target_is_reached(sweeping: Sweeping) -> None:
    metric = {"name": "eval/harmful/embedding/success_rate", "target": 0.5}
    engine = sweeping.engine(metric=metric, parameters=parameters(["works"], [0.3, 0.5, 0.9]))
    engine.run()
    assert [own.value for own in engine.search.trials()] == pytest.approx([0.7, 0.5])


def test_a_trial_without_results_has_failed_and_does_not_stop_the_rest(sweeping: Sweeping) -> None:
    engine = sweeping.engine(parameters=parameters(["works", "untrained"], [0.3, 0.4]))
    engine.run()
    assert states(engine) == ["COMPLETE"] * 2 + ["FAIL"] * 2
    assert engine.search.trials()[2].user_attrs[ERROR].startswith("its last evaluation was before training")


def test_a_trial_that_lags_behind_is_ended(sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "LOOK_SECONDS", 0.0)
    engine = sweeping.engine(
        parameters={"vars.epsilon": {"value": 0.5}, "vars.method": {"values": ["works", "lags"]}},
        early_terminate={"type": "hyperband", "min_iter": 1, "max_iter": 1},
        keep=1,
    )
    # The first is over before anybody looks at it: what it had reached by then.
    first = engine.search.begin()
    engine.search.drawn(first)
    assert not engine.search.lags(first, [0.4])
    engine.run()
    assert states(engine) == ["COMPLETE", "PRUNED"]
    assert [path.parent.name[:10] for path in sweeping.place.glob(f"{TRIALS}/*/model")] == ["trial_0000"]


def test_a_signal_ends_the_trials_and_the_same_sweep_goes_on(sweeping: Sweeping) -> None:
    assert threading.current_thread() is threading.main_thread()
    settings = {"parameters": parameters(["works", "stops"], [0.5])}
    engine = sweeping.engine(**settings)
    with pytest.raises(Stopped, match="SIGTERM"):
        engine.run()
    assert states(engine) == ["COMPLETE", "RUNNING"]
    again = sweeping.engine(**settings)
    again.run()
    assert states(again) == ["COMPLETE", "COMPLETE"]
    assert sweeping.calls() == ["fit trial_0000", "fit trial_0001", "fit trial_0001"]


def test_a_trial_that_is_killed_is_taken_up_again_and_fails_at_last(sweeping: Sweeping) -> None:
    engine = sweeping.engine(parameters=parameters(["killed once", "killed"], [0.5]))
    engine.run()
    assert states(engine) == ["COMPLETE", "FAIL"]
    assert sweeping.calls() == ["fit trial_0000"] * 2 + ["fit trial_0001"] * 3
    assert engine.search.trials()[1].user_attrs[ERROR].startswith("fit ended with status -9: ")


def test_a_trial_that_fails_is_begun_again_as_often_as_asked(sweeping: Sweeping) -> None:
    engine = sweeping.engine(parameters=parameters(["fails once", "fails", "wrong"], [0.5]), retries=1)
    engine.run()
    assert states(engine) == ["COMPLETE", "FAIL", "FAIL"]
    assert [call[-1] for call in sweeping.calls()] == ["0", "0", "1", "1", "2"]  # what is wrong stays wrong
    assert "status 1: broken on purpose (" in engine.search.trials()[1].user_attrs[ERROR]
    assert "status 2: x: unknown field (" in engine.search.trials()[2].user_attrs[ERROR]


def test_a_trial_that_runs_for_too_long_is_ended(sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "GRACE_SECONDS", 1.0)
    settings = {"trial_minutes": 0.05, "retries": 1}
    methods = parameters(["slow", "deaf", "works"], [0.5])
    engine = sweeping.engine(workers=3, parameters=methods, **settings)
    engine.run()
    assert states(engine) == ["FAIL", "FAIL", "COMPLETE"]
    errors = [own.user_attrs.get(ERROR) for own in engine.search.trials()]
    assert errors == ["it ran for more than 0.05 minutes"] * 2 + [None]


def test_a_folder_that_a_process_still_holds_is_waited_for(sweeping: Sweeping) -> None:
    folder = sweeping.job("works").folder
    freed: list[float] = []
    with ExitStack() as held:
        held.enter_context(RunLock(folder))
        release = threading.Timer(0.6, lambda: (freed.append(time.time()), held.close()))
        release.start()
        engine = sweeping.engine(parameters=parameters(["works"], [0.5]))
        engine.run()
        release.join()
    assert states(engine) == ["COMPLETE"] and engine.search.trials()[0].user_attrs[FOLDER] == folder.name
    assert (folder / LOG).stat().st_ctime >= freed[0]


def test_a_killed_sweep_goes_on_where_it_was(sweeping: Sweeping) -> None:
    """kill -9 while a trial runs, and a journal whose last line was cut short."""
    settings: dict[str, Any] = {
        "method": "random",
        "run_cap": 4,
        "parameters": {"vars.method": {"value": "slow"}, "vars.epsilon": {"min": 0.0, "max": 1.0}},
    }
    process = multiprocessing.get_context("fork").Process(target=lambda: sweeping.engine(**settings).run())
    process.start()
    until = time.monotonic() + 60
    while not [*sweeping.place.glob(f"{TRIALS}/*/checkpoints/*")] and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.join()
    with (sweeping.place / JOURNAL).open("ab") as stream:
        stream.write(b'{"op_code":5,"worker')
    Path("go").touch()
    engine = sweeping.engine(**settings)
    (trial,) = engine.search.trials()
    assert trial.state == TrialState.RUNNING
    engine.run()
    # What was begun goes on in its own folder with its own values; no trial is lost, none is done twice.
    assert sweeping.calls() == ["fit trial_0000", *(f"fit trial_{i:04d}" for i in range(4))]
    assert engine.search.trials()[0].params == trial.params and states(engine) == ["COMPLETE"] * 4


def test_a_killed_sweep_takes_up_the_jobs_that_went_on_without_it(sweeping: Sweeping) -> None:
    """kill -9 of the sweep alone: Slurm's jobs know nothing of it. None is started twice, none is lost."""
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    settings: dict[str, Any] = {
        "method": "random",
        "run_cap": 3,
        "parameters": {"vars.method": {"value": "slow"}, "vars.epsilon": {"min": 0.0, "max": 1.0}},
    }

    def slurm() -> Slurm:
        return Slurm(sweeping.place, {"cluster": "local", "timeout_min": 5}, sweeping.program)

    process = multiprocessing.get_context("fork").Process(
        target=lambda: sweeping.engine(slurm(), workers=2, **settings).run()
    )
    process.start()
    until = time.monotonic() + 60
    while len([*sweeping.place.glob(f"{TRIALS}/*/own")]) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.join()
    engine = sweeping.engine(slurm(), workers=2, **settings)
    drawn = [trial.params for trial in engine.search.trials()]
    assert len(drawn) == 2
    Path("go").touch()
    engine.run()
    assert sorted(sweeping.calls()) == [f"fit trial_{i:04d}" for i in range(3)]
    trials = engine.search.trials()
    assert states(engine) == ["COMPLETE"] * 3 and [trial.params for trial in trials[:2]] == drawn


def test_a_job_that_still_waits_in_slurms_queue_is_not_lost_by_a_kill(
    sweeping: Sweeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sacct says of job 123 that it is pending, of 124 that it was cancelled."""
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    (tmp_path / "bin").mkdir()
    (sweeping.place / "slurm").mkdir()  # the earlier process has made it
    said = "JobID|State|NodeList\\n123|PENDING|\\n124|CANCELLED|"
    for name, words in (("srun", ""), ("sacct", f'printf "{said}"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{words}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    slurm = Slurm(sweeping.place, {}, sweeping.program)
    waits = slurm.again("123", sweeping.place)
    assert waits is not None and waits.status() is None
    assert slurm.again("124", sweeping.place) is None


def test_jobs_of_submitit_run_the_trials(sweeping: Sweeping) -> None:
    """By submitit's own executor of one machine."""
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    slurm = Slurm(sweeping.place, {"cluster": "local", "timeout_min": 5}, sweeping.program)
    engine = sweeping.engine(slurm, workers=2, parameters=parameters(["works", "fails"], [0.5]))
    engine.run()
    assert states(engine) == ["COMPLETE", "FAIL"]
    assert "fit ended with status 1: broken on purpose (" in engine.search.trials()[1].user_attrs[ERROR]
    # What a killed sweep has left running, or done, is found by the job's number.
    name = engine.search.trials()[0].user_attrs[COMMAND]
    found = slurm.again(name, sweeping.place)
    assert found is not None and found.status() == 0
    assert slurm.again(engine.search.trials()[1].user_attrs[COMMAND], sweeping.place) is None
    with pytest.raises(ConfigError, match="--backend slurm: .*gpus_per_nod"):
        Slurm(sweeping.place, {"cluster": "local", "gpus_per_nod": 1})


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """As a process has them from a terminal, and as a script's background command has them: ignored."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_command_that_has_just_been_started_ends_with_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt between the command's start and the name for it, as a job that is cancelled gets one."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def begins(*words: Any, **how: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*words, **how))
        _thread.interrupt_main()
        time.sleep(0.3)
        return started[0]

    monkeypatch.setattr("experiments.studies.processes.subprocess.Popen", begins)
    program = (sys.executable, "-c", "import time; time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        Resumable()(["fit"], tmp_path / "run", 1, program, tmp_path)
    assert started[0].poll() == -signal.SIGTERM


def test_a_job_whose_command_cannot_be_started_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no_such_program"):
        Resumable()(["fit"], tmp_path / "run", 1, ("no_such_program",), tmp_path)
