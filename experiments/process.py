"""What this process must know before the heavy imports: who started it, and whether it was asked to end.

A parent that dies during the imports would have been replaced already; a signal during them may be lost in a
library that catches everything.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

STARTED_BY = os.getppid()
ENDS_WITH = "THUNDERCAT_ENDS_WITH"
"""Environment variable: the id of the process that waits for this one, and with which it ends."""
ASKED: list[int] = []
"""Signals that came before a run put its own handlers in place."""


class Ended(BaseException):
    """A signal asked the process to end before anything was run."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def listen() -> None:
    """Note SIGINT and SIGTERM from here on, at a second one the process ends as it is; in a job of Slurm's,
    hold back the signal that the job must make room."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _note)
    if "SLURM_JOB_ID" in os.environ:
        # It waits, in all threads to come, for the one that puts a job back into the queue; it would end the
        # process before there is one.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])


def end_if_asked() -> None:
    """Raises: Ended where a signal came whose exception something has caught."""
    if ASKED:
        raise Ended(ASKED[0])


def _note(number: int, frame: FrameType | None) -> None:
    if ASKED:
        os._exit(128 + number)
    ASKED.append(number)
    raise Ended(number)
