"""The actor of a trial of Ray Tune. It imports little: every trial begins with it."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from ray import tune

from callbacks.run_folder.lock import held_elsewhere, in_use, release
from experiments.studies.processes import POLL_SECONDS, Running

LOOK_SECONDS = 1.0
"""Between two reports."""
GRACE_SECONDS = 60.0
"""What a command that is asked to end has to do so by itself."""
LOST_SECONDS = 30.0
"""After which a lock that another machine has left is taken for a lost actor's: a command ends within
seconds of the process that it was started by."""


class Actor(tune.Trainable):  # type: ignore[misc]
    """A command in an actor. Its state is the run folder: there is nothing that Tune would have to keep."""

    def setup(self, config: dict[str, Any]) -> None:
        self._words, self._folder = config["words"], Path(config["folder"])
        self._how = config["threads"], config["program"], Path(config["cwd"])
        self._stop = Path(config["stop"])
        self._began = time.monotonic()
        self._asked: float | None = None
        """When the command was asked to end."""
        self._running: Running | None = None

    def step(self) -> dict[str, Any]:
        """Look after the command for a while. Returns its exit status, None while it runs, and the error of
        one that could not be begun."""
        until = time.monotonic() + LOOK_SECONDS
        while True:
            if self._running is None and self._stop.exists():
                return {"status": -signal.SIGTERM, "done": True}  # asked to end while it waited: never begun
            if self._running is None and self._is_free():
                release(self._folder)
                try:
                    self._running = Running(self._words, self._folder, *self._how)
                except OSError as error:  # it will not be begun a second time either
                    return {"status": 1, "error": str(error), "done": True}
            if self._running is not None and self._stop.exists():
                self._end(self._running)
            status = None if self._running is None else self._running.status()
            if status is not None or time.monotonic() > until:
                return {"status": status, "done": status is not None}
            time.sleep(POLL_SECONDS)

    def _is_free(self) -> bool:
        """Whether nobody is in the folder: what a lost actor has started ends with it, and holds it until
        then."""
        lost = time.monotonic() - self._began > LOST_SECONDS
        return not in_use(self._folder) and (lost or not held_elsewhere(self._folder))

    def _end(self, running: Running) -> None:
        """Ask once, and insist when its time is up."""
        if self._asked is None:
            self._asked = time.monotonic()
            running.stop()
        elif time.monotonic() > self._asked + GRACE_SECONDS:
            running.kill()

    def cleanup(self) -> None:
        """End the command, where Tune itself ends."""
        while self._running is not None and self._running.status() is None:
            self._end(self._running)
            time.sleep(POLL_SECONDS)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        pass
