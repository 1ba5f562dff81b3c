"""Runs a sweep's trials, several at a time, until there are as many as were asked for.

Everything that is known of a trial is in the journal or in its folder, so that a sweep which was killed goes
on from there: a trial that was running is taken up again in its folder, from its last checkpoint.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import Trial
from tqdm.auto import tqdm

from callbacks.run_folder.folder import RunFolder
from callbacks.run_folder.lock import in_use
from callbacks.run_folder.stopping import Stopped, stoppable
from experiments.config.errors import ConfigError
from experiments.counting import Lines, counter
from experiments.studies.processes import NO_SPACE, POLL_SECONDS
from experiments.studies.scheduling import Job
from experiments.sweeps.backends import Backend, Command
from experiments.sweeps.disk import is_full, tidy
from experiments.sweeps.measured import Unmeasured, cells, excesses, periodic, stamp
from experiments.sweeps.search import COMMAND, FOLDER, INTERRUPTED, RETRIED, Search
from experiments.sweeps.trials import fingerprint, job_of

ATTEMPTS = 3
"""A trial that is killed so often has failed; until then it goes on from its last checkpoint."""
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
FROM_OUTSIDE = {status for number in SIGNALS for status in (-number, 128 + number)}
"""Exit statuses of a process that somebody or something else has ended."""
LOOK_SECONDS = 5.0
"""Between two looks at a running trial's evaluations."""
GRACE_SECONDS = 60.0
"""What a trial whose time is up has to end by itself."""
WRONG_CALL = 2
"""Exit status of a command whose configuration is wrong: it will be wrong again."""

CHANGED = (
    "the files of `config` have changed since the sweep was begun: what is finished is kept; the same "
    "command begins another sweep with them, or goes on with this one where the change is taken back"
)


@dataclass
class Attempt:
    """A trial of this process, waiting or running."""

    trial: Trial
    job: Job
    command: Command | None = None
    looked: float = 0.0
    seen: int = -1
    lags: bool = False
    began: float = 0.0
    late: bool = False


@dataclass
class Engine:
    """One sweep's loop.

    Args:
        search: what was drawn, and what comes next.
        backend: where commands run.
        workers: trials at a time.
        place: the sweep's folder.
    """

    search: Search
    backend: Backend
    workers: int
    place: Path
    _attempts: list[Attempt] = field(default_factory=list)
    _fingerprint: str = ""

    def __post_init__(self) -> None:
        self._fingerprint = fingerprint(self.search.sweep, self.search.space, self.place)

    def run(self) -> None:
        """Raises, when all commands have ended: Stopped; OSError where the disk is full; ConfigError where
        the sweep's files have changed meanwhile, or no trial can be counted."""
        over = len(self.search.trials()) - len(self.search.unfinished())
        bar = counter(self.search.total, "sweep", "trial", over)
        with stoppable(), bar:
            try:
                for trial in self.search.unfinished():
                    self._take_up(trial)
                while self._step(bar):
                    time.sleep(POLL_SECONDS)
            except BaseException:
                self._stop_all()
                raise
        self._tidy()

    def _step(self, bar: tqdm[Any] | Lines) -> bool:
        """Look after every trial once; whether anything is left to do."""
        while len(self._attempts) < self.workers and self._another():
            self._take_up(self.search.begin())
        for own in list(self._attempts):
            if own.command is None:
                self._begin(own)
            if own.command is not None and own.command.status() is None:
                self._watch_time(own, own.command)
                self._look(own)
            elif own.command is not None and self._end(own):
                self._attempts.remove(own)
                bar.update()
                self._tidy()
        return bool(self._attempts) or self._another()

    def _another(self) -> bool:
        return len(self.search.trials()) < self.search.total and not self.search.reached()

    def _take_up(self, trial: Trial) -> None:
        """Make a trial's folder, and wait for its turn."""
        values = self.search.drawn(trial)
        self._refuse_changed()
        try:
            job = job_of(self.search.sweep, values, trial.number, self.place)
        except ConfigError as error:  # two values that do not go together
            self.search.fail(trial, str(error))
            return
        # From now on the next trial with the same values finds it.
        job.folder.mkdir(parents=True, exist_ok=True)
        trial.set_user_attr(FOLDER, job.folder.name)
        self._attempts.append(Attempt(trial, job))

    def _refuse_changed(self) -> None:
        """Raises: ConfigError where a file of the sweep says something else than at its beginning: its trials
        would be of two sweeps."""
        if fingerprint(self.search.sweep, self.search.space, self.place) != self._fingerprint:
            raise ConfigError(CHANGED)

    def _begin(self, own: Attempt) -> None:
        """Start it where its folder is free: another trial with the same values may be in it, or a process
        that a kill has left over."""
        running = [other.job.folder for other in self._attempts if other.command is not None]
        running += [other.job.folder for other in self._attempts[: self._attempts.index(own)]]
        if own.job.folder in running or in_use(own.job.folder):
            return
        if own.job.state() in ("to be judged", "done"):
            own.command = Done()
        else:
            earlier = own.trial.user_attrs.get(COMMAND)
            found = self.backend.again(earlier, own.job.folder) if earlier is not None else None
            own.command = found or self.backend.start(own.job.fit, own.job.folder)
            own.began = time.monotonic()
            if own.command.name is not None:
                own.trial.set_user_attr(COMMAND, own.command.name)

    def _watch_time(self, own: Attempt, command: Command) -> None:
        """End a trial whose time is up."""
        if command.waiting:
            own.began = time.monotonic()
        minutes = self.search.sweep.trial_minutes
        over = -1.0 if minutes is None else time.monotonic() - own.began - 60 * minutes
        if over > GRACE_SECONDS:
            command.kill()
        elif over > 0 and not own.late:
            own.late = True
            command.stop()

    def _look(self, own: Attempt) -> None:
        """End a trial that lags behind the others at the same evaluation."""
        if self.search.sweep.early_terminate is None or own.lags or own.command is None:
            return
        now = time.monotonic()
        if now - own.looked < LOOK_SECONDS:
            return
        own.looked, seen = now, stamp(own.job.folder)
        if seen != own.seen:
            own.seen = seen
            own.lags = self.search.lags(own.trial, periodic(self.search.sweep, own.job.folder))
        if own.lags:
            own.command.stop()

    def _end(self, own: Attempt) -> bool:
        """Note what a trial has come to; false where it is to be taken up again."""
        assert own.command is not None
        status = own.command.status()
        if own.lags and status != 0:
            self.search.prune(own.trial)
        elif own.late and status != 0:
            self.search.fail(own.trial, f"it ran for more than {self.search.sweep.trial_minutes:g} minutes")
        elif status in FROM_OUTSIDE and not self._too_often(own):
            own.command = None
            return False
        elif status != 0:
            error = own.command.failure()
            if NO_SPACE in error or os.strerror(errno.ENOSPC) in error or is_full(self.place):
                raise OSError(errno.ENOSPC, NO_SPACE)  # not the trial's own doing: it will go on
            if status != WRONG_CALL and self._once_more(own):
                own.command = None
                return False
            self.search.fail(own.trial, error)
        else:
            self._refuse_changed()
            own.job.finish("fit")
            self._tell(own)
        return True

    def _too_often(self, own: Attempt) -> bool:
        """Whether it may be the trial's own doing, as where its memory does not suffice."""
        times = own.trial.user_attrs.get(INTERRUPTED, 0) + 1
        own.trial.set_user_attr(INTERRUPTED, times)
        return bool(times >= ATTEMPTS)

    def _once_more(self, own: Attempt) -> bool:
        """Whether a trial that has failed is to be begun again."""
        times = own.trial.user_attrs.get(RETRIED, 0)
        if times >= self.search.sweep.retries:
            return False
        own.trial.set_user_attr(RETRIED, times + 1)
        return True

    def _tell(self, own: Attempt) -> None:
        sweep = self.search.sweep
        try:
            found = cells(sweep, own.job.folder)
            broken = excesses(sweep, found)
            value = found[sweep.objective].after
        except (ValueError, OSError, KeyError) as error:
            text = " ".join(str(error).split())
            self.search.fail(own.trial, text)
            if isinstance(error, Unmeasured) and not self.search.ranked():
                raise ConfigError(f"trial {own.trial.number}, and so any other: {text}") from error
            return
        self.search.complete(own.trial, value, broken, {label: asdict(cell) for label, cell in found.items()})

    def _tidy(self) -> None:
        tidy(self.search, self.place, [own.job.folder for own in self._attempts])

    def _stop_all(self) -> None:
        running = [own.command for own in self._attempts if own.command is not None]
        for command in running:
            command.stop()
        while any(command.status() is None for command in running):
            time.sleep(POLL_SECONDS)

    def judge(self) -> str | None:
        """Evaluate the best trial on test, where that was not done. Returns why it failed, or None.

        Raises: Stopped, when the command has ended.
        """
        best = self.search.best()
        values = None if best is None else self.search.values_of(best)
        if best is None or values is None or not self.search.sweep.test:
            return None
        job = job_of(self.search.sweep, values, best.number, self.place, judged=True)
        if job.state() == "done":
            return None
        words = [job.test]
        if not any(RunFolder.of(job.folder).checkpoints.glob("*.ckpt")):
            words.insert(0, job.fit)  # an earlier search, with other constraints, has removed its model
        with stoppable():
            for own in words:
                reason = self._wait(own, job)
                if reason is not None:
                    return reason
        job.finish("test")
        return None

    def _wait(self, words: Sequence[str], job: Job) -> str | None:
        """One command to its end; why it failed, or None."""
        while in_use(job.folder):
            time.sleep(POLL_SECONDS)
        command = self.backend.start(words, job.folder)
        try:
            while command.status() is None:
                time.sleep(POLL_SECONDS)
        except (Stopped, KeyboardInterrupt):
            command.stop()
            while command.status() is None:
                time.sleep(POLL_SECONDS)
            raise
        return command.failure() if command.status() else None


class Done:
    """The command of what another trial with the same values, or an earlier process, has finished."""

    name = None
    waiting = False

    def status(self) -> int:
        return 0

    def stop(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def failure(self) -> str:
        return ""
