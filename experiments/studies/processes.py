"""The commands of studies and sweeps: each a process of its own, whose output goes to its run's log.

They end with the process that started them, also where that one was killed: nothing is trained that nobody
waits for, and what goes on in a run's folder later finds it free.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any, TypeVar

from experiments.process import ENDS_WITH

T = TypeVar("T")
LOG = "log.txt"
NO_SPACE = "no space left on the disk"
"""What a command says whose disk is full."""
POLL_SECONDS = 0.2
PROGRAM = (sys.executable, "-m", "experiments.cli")


class Running:
    """A command that has been started.

    Args:
        words: the command and its options, e.g. `fit --config=...`.
        folder: its run folder.
        threads: how many threads it may use.
        program: what is started with these words.
        cwd: its working directory; null takes this process's.
    """

    name = None
    """Nobody finds it after this process: it ends with it."""
    waiting = False

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        threads: int,
        program: Sequence[str] = PROGRAM,
        cwd: Path | None = None,
    ) -> None:
        self.words, self.folder = tuple(words), folder
        folder.mkdir(parents=True, exist_ok=True)
        own = {
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            ENDS_WITH: str(os.getpid()),
        }
        with (folder / LOG).open("ab") as stream:
            self._begin = stream.tell()
            self._process = subprocess.Popen(
                [*program, *words],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own},
                cwd=cwd,
            )

    def status(self) -> int | None:
        """Exit status, negative where a signal ended it; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Until it has ended. Returns its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """Ask it to end, as SIGTERM does."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        if self._process.poll() is None:
            self._process.kill()

    def failure(self) -> str:
        """Why it ended, in one line: its status and its last words."""
        return failure(self.words[0], self._process.poll(), self.folder, self._begin)


class Resumable:
    """A command in a job of submitit's. Where a job is preempted or its time is up, it is queued again and
    goes on from its last checkpoint."""

    def __call__(
        self, words: Sequence[str], folder: Path, threads: int, program: Sequence[str], cwd: Path
    ) -> int:
        """From its beginning to its end. Returns its exit status."""
        _listen()
        begun: Future[Running] = Future()
        # Where the job is asked to end, this thread is interrupted: between the command's start and the name
        # for it nobody could end it. Another thread is not interrupted.
        starting = Thread(target=_start, args=(begun, words, folder, threads, program, cwd))
        try:
            starting.start()
            running = begun.result()
            while (status := running.status()) is None:
                time.sleep(POLL_SECONDS)
            return status
        except BaseException:  # the job is asked to end: so is the command
            if starting.ident is not None and _insist(begun.exception) is None:
                running = begun.result()
                running.stop()
                # It frees its folder last, however often one is asked to end meanwhile.
                while _insist(running.status) is None:
                    _insist(lambda: time.sleep(POLL_SECONDS))
            raise

    def checkpoint(self, *arguments: Any) -> Any:
        """As submitit asks for it."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def _listen() -> None:
    """submitit ends a job of this machine by an interrupt. A script's background command (`nohup thundercat
    sweep ... &`) and all that it starts ignore interrupts, until this says otherwise."""
    if current_thread() is main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _start(begun: Future[Running], *command: Any) -> None:
    try:
        begun.set_result(Running(*command))
    except BaseException as error:
        begun.set_exception(error)


def _insist(call: Callable[[], T]) -> T:
    """What a call returns, though one is interrupted meanwhile."""
    while True:
        with suppress(KeyboardInterrupt):
            return call()


def failure(command: str, status: int | None, folder: Path, begin: int = 0) -> str:
    """What a command that failed said last, from a place of its log on, in one line."""
    log = folder / LOG
    said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines() if log.is_file() else []
    last = said[-1].removeprefix("thundercat: ") if said else ""
    return f"{command} ended with status {status}: {last} ({log})"
