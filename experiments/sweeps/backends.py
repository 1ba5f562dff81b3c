"""Where a sweep's commands run. The search asks and is told here, whatever the place."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from callbacks.run_folder.lock import release
from experiments.config.errors import ConfigError
from experiments.studies.processes import PROGRAM, Resumable, Running, failure
from experiments.studies.scheduling import threads


class Command(Protocol):
    """One that has been started."""

    @property
    def name(self) -> str | None:
        """What the backend finds it by, after this process; None where it ends with this process."""
        ...

    @property
    def waiting(self) -> bool:
        """Whether it is known to wait for a place to run: that time is not its own."""
        ...

    def status(self) -> int | None:
        """Exit status, negative where a signal ended it; None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to end."""
        ...

    def kill(self) -> None:
        """End it, where it does not do so when asked."""
        ...

    def failure(self) -> str:
        """Why it ended, in one line."""
        ...


class Backend(Protocol):
    """Starts commands."""

    def start(self, words: Sequence[str], folder: Path) -> Command: ...

    def again(self, name: str, folder: Path) -> Command | None:
        """The command of an earlier process, where it goes on or has ended well."""
        ...


class Local:
    """Processes of this machine, which share its cores and end with this one.

    Args:
        workers: how many run at a time.
        program: what is started with a command's words.
    """

    def __init__(self, workers: int, program: Sequence[str] = PROGRAM) -> None:
        self.threads = threads(workers)
        self.program = program

    def start(self, words: Sequence[str], folder: Path) -> Command:
        return Running(words, folder, self.threads, self.program)

    def again(self, name: str, folder: Path) -> None:
        return None


CLUSTERS = ("slurm", "local", "debug")
"""Of submitit's executors."""


class Slurm:
    """Jobs of a Slurm cluster, through submitit; they go on where this process is killed.

    Args:
        place: the sweep's folder, on a disk that all nodes see.
        parameters: of submitit's executor: `timeout_min`, `slurm_partition`, `gpus_per_node`,
            `cpus_per_task`, ...; with `cluster: local` it runs the same without Slurm.
        program: what is started with a command's words.

    Raises: ConfigError where there is no Slurm, or a parameter that submitit does not know.
    """

    def __init__(
        self,
        place: Path,
        parameters: Mapping[str, Any],
        program: Sequence[str] = PROGRAM,
    ) -> None:
        import submitit

        own = {**parameters}
        cluster = own.pop("cluster", "slurm")
        self.folder = place / "slurm"
        self.program = program
        if cluster not in CLUSTERS:
            raise ConfigError(
                f"--backend slurm: slurm.cluster: expected {', '.join(CLUSTERS)}, got {cluster!r}"
            )
        try:
            self.threads = int(own.get("cpus_per_task", 1))
            self.executor = submitit.AutoExecutor(self.folder, cluster=cluster)
            # AutoExecutor's own `job_class` knows no cluster, and so of no job how it fares.
            kinds = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}
            self.kind = kinds.get(self.executor.cluster, submitit.DebugJob)
            self.executor.update_parameters(name=f"sweep_{place.name}", **own)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise ConfigError(f"--backend slurm: {' '.join(str(error).split())}") from error

    def start(self, words: Sequence[str], folder: Path) -> Command:
        where = folder.resolve(), self.threads, [*self.program], Path.cwd()
        job = self.executor.submit(Resumable(), [*words], *where)
        return SlurmJob(job, words[0], folder)

    def again(self, name: str, folder: Path) -> Command | None:
        found = SlurmJob(self.kind(self.folder, name), "fit", folder)
        if found.status() in (None, 0):
            return found
        # A job that a kill kept from the journal may still be in the folder: it holds the lock, and stops us.
        release(folder)
        return None


def check_slurm(parameters: Mapping[str, Any]) -> None:
    """Raises: ConfigError for a parameter that submitit does not know; asks no Slurm, leaves no folder."""
    with TemporaryDirectory() as folder:
        own = dict(parameters)
        if own.get("cluster", "slurm") == "slurm":
            own["cluster"] = "debug"
        Slurm(Path(folder), own)


class SlurmJob:
    """One job of submitit as a command."""

    waiting = False

    def __init__(self, job: Any, command: str, folder: Path) -> None:
        self.job, self.command, self.folder = job, command, folder
        self.name: str | None = str(job.job_id)

    def status(self) -> int | None:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        if not self.job.done() or self._goes_on():
            return None
        try:
            return int(self.job.result())
        except UncompletedJobError:  # cancelled, or its node is gone: the command said nothing of itself
            return -signal.SIGTERM
        except FailedJobError:
            return 1

    def stop(self) -> None:
        self._signal(signal.SIGINT)  # what the executor does to a job of its own
        self.job.cancel()

    def kill(self) -> None:
        """Slurm itself kills what does not end (KillWait)."""
        self._signal(signal.SIGKILL)
        self.job.cancel()

    def _signal(self, number: signal.Signals) -> None:
        if self._goes_on():
            with suppress(ProcessLookupError):
                os.kill(int(self.job.job_id), number)

    def _goes_on(self) -> bool:
        """Whether a job of this machine that an earlier process has started still runs: submitit knows of
        those alone that this one has started."""
        from submitit import LocalJob

        if not isinstance(self.job, LocalJob) or self.job._process is not None:
            return False
        try:  # its number is its process's; another process may have that by now, of another sweep even
            words = Path(f"/proc/{self.job.job_id}/cmdline").read_bytes()
        except OSError:
            return False
        return b"submitit" in words and str(self.job.paths.folder).encode() in words

    def failure(self) -> str:
        return f"job {self.name}: {failure(self.command, self.status(), self.folder)}"
