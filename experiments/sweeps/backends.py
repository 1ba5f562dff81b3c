"""Where a sweep's commands run. The search asks and is told here, whatever the place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from experiments.studies.processes import PROGRAM, Running
from experiments.studies.scheduling import threads


class Command(Protocol):
    """One that has been started."""

    def status(self) -> int | None:
        """Exit status, negative where a signal ended it; None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to end."""
        ...

    def failure(self) -> str:
        """Why it ended, in one line."""
        ...


class Backend(Protocol):
    """Starts commands."""

    def start(self, words: Sequence[str], folder: Path) -> Command: ...


class Local:
    """Processes of this machine, which share its cores.

    Args:
        workers: how many run at a time.
        program: what is started with a command's words.
    """

    def __init__(self, workers: int, program: Sequence[str] = PROGRAM) -> None:
        self.threads = threads(workers)
        self.program = program

    def start(self, words: Sequence[str], folder: Path) -> Command:
        return Running(words, folder, self.threads, self.program)
