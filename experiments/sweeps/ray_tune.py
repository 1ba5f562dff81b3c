"""Ray Tune as the place of a sweep's commands: each is an actor that holds its share of a cluster.

Tune places, starts and ends them, and starts one again whose worker or node is lost. What is drawn and what
goes on after a kill the sweep's journal decides, as with every backend; Tune's experiment state is not read.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from experiments.config.errors import ConfigError
from experiments.studies.processes import PROGRAM, failure
from experiments.sweeps.backends import Command
from experiments.sweeps.ray_actor import GRACE_SECONDS, Actor

log = logging.getLogger(__name__)
RESTARTS = 2
"""How often Tune starts an actor again that was lost; its command goes on from its last checkpoint."""
SHARES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
"""Option -> what Ray calls it; `resources` names others."""
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}
"""The trials' own log and rows say what they do."""


class Tuned:
    """One trial of Tune as a command.

    Args:
        words: the command and its options.
        folder: its run folder.
        stop: a file whose existence asks the actor, on whatever node, to end it.
        tunes: whether there is still somebody who will tell what becomes of it.
    """

    name = None
    """Nobody finds it after this process: it ends with it."""

    def __init__(self, words: Sequence[str], folder: Path, stop: Path, tunes: Callable[[], bool]) -> None:
        self.words, self.folder, self.stop_file = tuple(words), folder, stop
        self.tunes = tunes
        self.begun = False
        self.ended: int | None = None
        self.error = ""

    @property
    def waiting(self) -> bool:
        """Whether it has no share of the cluster yet."""
        return not self.begun

    def status(self) -> int | None:
        # One that waits for its share may wait for ever; asked to end, it will not be begun.
        gone = not self.tunes() or (self.waiting and self.stop_file.exists())
        return -signal.SIGTERM if self.ended is None and gone else self.ended

    def stop(self) -> None:
        self.stop_file.touch()

    def kill(self) -> None:
        """The actor kills what does not end in time (`GRACE_SECONDS`)."""
        self.stop()

    def failure(self) -> str:
        return self.error or failure(self.words[0], self.ended, self.folder)


class RayTune:
    """Trials of Ray Tune on the cluster of RAY_ADDRESS or one of this machine; they end with this process.

    Args:
        place: the sweep's folder, on a disk that all nodes see.
        options: a trial's share: `num_cpus` (1), `num_gpus` (0; 0.5: two trials a GPU), `memory` (bytes),
            `resources`.
        program: what is started with a command's words.

    Raises: ConfigError for an option that is none of these, or no number.
    """

    def __init__(self, place: Path, options: Mapping[str, Any], program: Sequence[str] = PROGRAM) -> None:
        self.bundle = bundle(options)
        self.program = [*program]
        self.threads = max(1, int(self.bundle.get("CPU", 0)))
        self.storage = place.resolve() / "ray"
        self.asked: deque[Tuned] = deque()
        self.running: dict[str, Tuned] = {}
        self.closing = False
        self.error = ""
        """Why Tune's loop has ended."""
        self._thread: Thread | None = None
        self._count = 0
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        there = ray.cluster_resources()
        if lacking := {name: own for name, own in self.bundle.items() if own > there.get(name, 0)}:
            log.warning(
                "--backend ray: a trial asks for %s, the cluster has %s: trials wait until it has more",
                lacking,
                {name: there.get(name, 0) for name in lacking},
            )
        shutil.rmtree(self.storage, ignore_errors=True)
        (self.storage / "stops").mkdir(parents=True)
        atexit.register(self.close)

    def start(self, words: Sequence[str], folder: Path) -> Command:
        """Raises: ConfigError where Tune has ended, with its reason."""
        if self._thread is None:
            self._thread = Thread(target=self._tune, daemon=True, name="ray_tune")
            self._thread.start()
        if not self._thread.is_alive():
            raise ConfigError(f"--backend ray: {self.error}; go on with the same command")
        self._count += 1
        command = Tuned(words, folder, self.storage / "stops" / str(self._count), self._thread.is_alive)
        self.asked.append(command)
        return command

    def again(self, name: str, folder: Path) -> None:
        return None

    def close(self) -> None:
        """End what runs, and Tune."""
        self.closing = True
        if self._thread is not None:
            self._thread.join(GRACE_SECONDS)
        atexit.unregister(self.close)

    def next(self, trial: str) -> dict[str, Any] | None:
        """The next command, as the configuration of a trial; None where there is none yet."""
        if not self.asked:
            return None
        command = self.running[trial] = self.asked.popleft()
        where = {"folder": str(command.folder.resolve()), "stop": str(command.stop_file)}
        how = {"threads": self.threads, "program": self.program, "cwd": str(Path.cwd())}
        return {"words": [*command.words], **where, **how}

    def begun(self, trial: str) -> None:
        """A trial has its share, and its actor."""
        if (command := self.running.get(trial)) is not None:
            command.begun = True

    def told(self, trial: str, status: int | None, error: str = "") -> None:
        """What has become of a trial; the status of one that Tune ends with itself is None."""
        if (command := self.running.pop(trial, None)) is not None:
            command.error = error
            command.ended = -signal.SIGTERM if status is None else status

    def _tune(self) -> None:
        """Tune's loop, for as long as there is a sweep."""
        try:
            tune.Tuner(
                tune.with_resources(Actor, tune.PlacementGroupFactory([self.bundle])),
                tune_config=tune.TuneConfig(search_alg=_Commands(self), num_samples=-1),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(self.storage),
                    failure_config=tune.FailureConfig(max_failures=RESTARTS),
                    stop=_Ends(self),
                    callbacks=[_Tells(self)],
                    verbose=0,
                ),
            ).fit()
            self.error = "Ray Tune has ended"
        except BaseException as error:  # nobody waits for this thread: the next start says it
            self.error = f"Ray Tune: {' '.join(str(error).split())}"


class _OfTune:
    """A part of Tune's that knows whose it is; Tune's copy of its settings, which nobody reads, does not."""

    def __init__(self, own: RayTune) -> None:
        super().__init__()
        self.own = own

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Commands(_OfTune, Searcher):  # type: ignore[misc]
    """What Tune draws are the commands that were asked for."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        # While there is nothing to do Tune asks here alone, and not the stopper.
        return Searcher.FINISHED if self.own.closing else self.own.next(trial_id)

    def on_trial_complete(self, trial_id: str, result: object = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Ends(_OfTune, tune.Stopper):  # type: ignore[misc]
    """Ends Tune; one trial is ended by its actor, which knows when its command has ended."""

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.own.closing


class _Tells(_OfTune, tune.Callback):  # type: ignore[misc]
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.own.begun(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        self.own.told(trial.trial_id, last.get("status"), last.get("error", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        said = f"its actor was lost {RESTARTS + 1} times; Ray's log says where: {trial.local_path}"
        self.own.told(trial.trial_id, 1, said)


def bundle(options: Mapping[str, Any]) -> dict[str, float]:
    """As a placement group has it. Raises: ConfigError."""
    named = {**options}
    found = {"CPU": 1.0, **named.pop("resources", {})}
    for option, value in named.items():
        if option not in SHARES:
            raise ConfigError(f"--backend ray: ray.{option}: expected {', '.join(SHARES)} or resources")
        found[SHARES[option]] = value
    for name, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"--backend ray: ray: {name}: expected a number of 0 or more, got {value!r}")
    if not any(found.values()):
        raise ConfigError("--backend ray: ray: expected a share of something, got none")
    return {name: float(value) for name, value in found.items() if value}
