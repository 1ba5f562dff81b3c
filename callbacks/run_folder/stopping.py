"""SIGTERM and Ctrl-C end a run at once, wherever it is, in an order that leaves its folder whole."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning import Callback, LightningModule, Trainer

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ORPHAN_CHECK_SECONDS = 1.0


class Stopped(BaseException):
    """A signal asked the process to end. No Exception: nothing that guards against failures may swallow
    it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_status(self) -> int:
        return 128 + self.number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` in the main thread at the first signal while the context lasts; end at once at a
    second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        signal.signal(other, _end)
    raise Stopped(number)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def end_with_parent(parent: int) -> None:
    """End this process, one of several of a run, once the one that started it (its id) is gone.

    A process that waits for the others to come to the start would wait for half an hour for a first one that
    was killed.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_CHECK_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="end_with_parent").start()


class StopsAtOnce(Callback):
    """Puts `stoppable`'s handlers back where Lightning has put its own; the CLI adds it to every run.

    Lightning's SIGTERM handler waits for the end of a batch, which in an evaluation is minutes away, and
    talks to the other processes from inside the handler, where they may be waiting for something else.
    """

    def _install(self, trainer: Trainer) -> None:
        # Lightning leaves SIGINT alone, so that its handler says whether `stoppable` is in force.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _stop:
            signal.signal(signal.SIGTERM, lambda number, frame: self._stop(trainer, number, frame))

    def _stop(self, trainer: Trainer, number: int, frame: FrameType | None) -> None:
        launcher = trainer.strategy.launcher
        # The processes that this one has started do not get its signal.
        if launcher is not None and trainer.world_size > 1:
            launcher.kill(number)
        _stop(number, frame)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)
