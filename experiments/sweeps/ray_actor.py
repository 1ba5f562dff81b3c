"""The actor of a trial of Ray Tune. It imports little: every trial begins with it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray import tune

from callbacks.run_folder.lock import in_use, release
from experiments.studies.processes import POLL_SECONDS, Running

LOOK_SECONDS = 1.0
"""Between two reports: so long a command that is asked to end goes on."""
GRACE_SECONDS = 60.0
"""What a command that is asked to end has to do so by itself."""


class Actor(tune.Trainable):  # type: ignore[misc]
    """A command in an actor. Its state is the run folder: there is nothing that Tune would have to keep."""

    def setup(self, config: dict[str, Any]) -> None:
        self._words, self._folder = config["words"], Path(config["folder"])
        self._how = config["threads"], config["program"], Path(config["cwd"])
        self._looks = 0
        self._running: Running | None = None

    def step(self) -> dict[str, Any]:
        """Look after the command for a while. Returns its exit status, None while it runs."""
        self._looks += 1
        if self._looks == 1:  # what was asked to end while it waited for its share is never begun
            return {"status": None}
        until = time.monotonic() + LOOK_SECONDS
        while True:
            # What a lost actor has started ends with it, and holds the folder until then.
            if self._running is None and not in_use(self._folder):
                release(self._folder)
                self._running = Running(self._words, self._folder, *self._how)
            status = None if self._running is None else self._running.status()
            if status is not None or time.monotonic() > until:
                return {"status": status, "done": status is not None}
            time.sleep(POLL_SECONDS)

    def cleanup(self) -> None:
        """End the command, where Tune ends the trial."""
        if self._running is None:
            return
        self._running.stop()
        until = time.monotonic() + GRACE_SECONDS
        while self._running.status() is None and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        self._running.kill()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        pass
