"""Ray Tune's actors run a sweep's trials, on a cluster of this machine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from callbacks.run_folder.lock import process_start
from experiments.config.errors import ConfigError
from tests.support.sweeping import Sweeping, parameters, states

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
ray_actor = pytest.importorskip("experiments.sweeps.ray_actor", reason="the extra `ray` is not installed")
ray_tune = pytest.importorskip("experiments.sweeps.ray_tune", reason="the extra `ray` is not installed")


def until(holds: Callable[[], Any], seconds: float = 90) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(holds())


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster is believed what it is told: there need be no GPU to share one out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else the other tests' processes come before its workers
        ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture
def sweeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeping:
    monkeypatch.chdir(tmp_path)
    return Sweeping(tmp_path)


@pytest.fixture
def tuned(sweeping: Sweeping) -> Iterator[Callable[..., Any]]:
    """Makes backends, and ends what a test has left: its loop would begin another cluster."""
    made: list[Any] = []

    def make(options: dict[str, float]) -> Any:
        made.append(ray_tune.RayTune(sweeping.place, options, sweeping.program))
        return made[-1]

    yield make
    for own in made:
        own.close()


def test_a_share_that_ray_does_not_know_is_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"num_gpu": 1}, "ray.num_gpu: expected num_cpus, num_gpus, memory or resources"),
        ({"num_gpus": "half"}, "ray: GPU: expected a number of 0 or more, got 'half'"),
        ({"resources": {"tpu": -1}}, "ray: tpu: expected a number of 0 or more, got -1"),
        ({"num_cpus": 0}, "ray: expected a share of something, got none"),
    ):
        with pytest.raises(ConfigError, match=said):
            ray_tune.RayTune(tmp_path, options)


@pytest.mark.usefixtures("cluster")
def test_actors_run_the_trials_and_share_a_gpu(sweeping: Sweeping, tuned: Callable[..., Any]) -> None:
    backend = tuned({"num_cpus": 0.1, "num_gpus": 0.5})
    engine = sweeping.engine(
        backend, workers=2, parameters=parameters(["works", "fails", "killed once"], [0.5])
    )
    engine.run()
    assert states(engine) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "fit ended with status 1: broken on purpose (" in engine.search.trials()[1].user_attrs["error"]

    # Two trials that ask for half of the GPU run at once, the third waits for either.
    jobs = [sweeping.job("slow", epsilon) for epsilon in (0.1, 0.2, 0.3)]
    runs = [job.folder / "checkpoints" for job in jobs]
    commands = [backend.start(job.fit, job.folder) for job in jobs]
    assert until(lambda: runs[0].exists() and runs[1].exists())
    assert ray.available_resources().get("GPU", 0) == 0
    time.sleep(2)
    assert not runs[2].exists() and [command.status() for command in commands] == [None] * 3

    # One that waits and one that runs are asked to end: the third begins, what waited never does.
    waiting = backend.start(sweeping.job("slow", 0.4).fit, sweeping.job("slow", 0.4).folder)
    assert waiting.waiting and not commands[0].waiting
    waiting.stop()
    assert waiting.status() == -signal.SIGTERM
    first = process_start(int((jobs[0].folder / "own").read_text()))
    commands[0].stop()
    assert until(lambda: commands[0].status() is not None)
    # Its end is told when the command has ended, and not before.
    assert process_start(int((jobs[0].folder / "own").read_text())) != first
    assert commands[0].status() == -signal.SIGTERM and until(runs[2].exists)
    (sweeping.place.parent / "go").touch()
    assert until(lambda: [command.status() for command in commands[1:]] == [0, 0])
    assert waiting.status() == -signal.SIGTERM
    assert not (sweeping.job("slow", 0.4).folder / "checkpoints").exists()
    backend.close()
    assert "ray_tune" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.usefixtures("cluster")
def test_a_share_that_the_cluster_cannot_give_is_said_and_holds_nobody_up(
    sweeping: Sweeping, tuned: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    backend = tuned({"num_gpus": 2})
    assert "a trial asks for {'GPU': 2.0}, the cluster has {'GPU': 1.0}: trials wait" in caplog.text
    job = sweeping.job("works")
    command = backend.start(job.fit, job.folder)
    time.sleep(2)
    assert command.status() is None and command.waiting
    command.stop()
    assert command.status() == -signal.SIGTERM
    backend.close()
    assert not job.folder.exists() or not (job.folder / "checkpoints").exists()


@pytest.mark.usefixtures("cluster")
def test_the_end_of_tune_is_the_end_of_the_sweep_and_of_no_trial(
    sweeping: Sweeping, tuned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("stale file handle")

    backend = tuned({"num_cpus": 0.1})
    monkeypatch.setattr(ray_tune.tune, "Tuner", broken)
    engine = sweeping.engine(backend, workers=2, parameters=parameters(["works"], [0.1, 0.2, 0.3]))
    with pytest.raises(ConfigError, match="--backend ray: Ray Tune: stale file handle; go on with the same"):
        engine.run()
    assert set(states(engine)) == {"RUNNING"}  # to be taken up again
    backend.close()


def test_a_lock_of_another_machine_is_waited_for_and_then_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.sweeps.ray_actor.LOST_SECONDS", 2.5)
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock.json").write_text('{"host": "elsewhere", "pid": 1, "started": "x"}')
    program = [sys.executable, "-c", "import sys; sys.exit(3)"]
    config = {"words": ["fit"], "folder": str(run), "threads": 1, "program": program, "cwd": str(tmp_path)}
    actor = ray_actor.Actor({**config, "stop": str(tmp_path / "stop")})
    began = time.monotonic()
    found = actor.step()
    assert found == {"status": None, "done": False} and (run / "lock.json").exists()
    while found["status"] is None and time.monotonic() < began + 30:
        found = actor.step()
    assert found == {"status": 3, "done": True} and time.monotonic() > began + 2
    # One that is asked to end before it has begun never begins.
    (tmp_path / "stop").touch()
    other = ray_actor.Actor({**config, "stop": str(tmp_path / "stop"), "program": ["no_such_program"]})
    assert other.step() == {"status": -signal.SIGTERM, "done": True}


@pytest.mark.usefixtures("cluster")
def test_an_actor_that_is_lost_is_started_again_by_tune(
    sweeping: Sweeping, tuned: Callable[..., Any]
) -> None:
    """Its command ends with it, and the next one goes on in the folder; the search hears nothing of it."""
    backend = tuned({"num_cpus": 0.1})
    job = sweeping.job("slow")
    command = backend.start(job.fit, job.folder)
    parent = job.folder / "parent"
    assert until(lambda: parent.exists() and parent.read_text())
    lost = int(parent.read_text())
    os.kill(lost, signal.SIGKILL)
    assert until(lambda: parent.read_text() not in ("", str(lost))) and command.status() is None
    (sweeping.place.parent / "go").touch()
    assert until(lambda: command.status() == 0)
    assert Path("calls.txt").read_text().count("fit") == 2

    # One that cannot even begin its command has failed, and says why.
    backend.program = ["no_such_program"]
    job = sweeping.job("works")
    command = backend.start(job.fit, job.folder)
    assert until(lambda: command.status() == 1)
    assert "no_such_program" in command.failure()


@pytest.mark.usefixtures("cluster")
def test_a_command_whose_actors_are_lost_again_and_again_has_failed(
    sweeping: Sweeping, tuned: Callable[..., Any]
) -> None:
    backend = tuned({"num_cpus": 0.1})
    job = sweeping.job("slow")
    command, parent = backend.start(job.fit, job.folder), job.folder / "parent"
    seen = {""}
    for _ in range(ray_tune.RESTARTS + 1):
        assert until(lambda: parent.exists() and parent.read_text() not in seen)
        seen.add(parent.read_text())
        os.kill(int(parent.read_text()), signal.SIGKILL)
    assert until(lambda: command.status() == 1)
    assert "its actor was lost 3 times" in command.failure()
