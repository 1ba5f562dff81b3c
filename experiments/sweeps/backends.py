"""Where a sweep's commands run. The search asks and is told here, whatever the place."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from callbacks.run_folder.folder import RunFolder
from experiments.config.errors import ConfigError
from experiments.studies.processes import PROGRAM, Resumable, Running, failure
from experiments.studies.scheduling import threads

ASK_AGAIN_SECONDS = 5.0
"""After which a task of Ray that has been asked to end is asked again."""


class Command(Protocol):
    """One that has been started."""

    @property
    def name(self) -> str | None:
        """What the backend finds it by, after this process; None where it ends with this process."""
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
        self.threads = int(own.get("cpus_per_task", 1))
        try:
            self.executor = submitit.AutoExecutor(self.folder, cluster=cluster)
            self.executor.update_parameters(name=f"sweep_{place.name}", **own)
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise ConfigError(f"--backend slurm: {' '.join(str(error).split())}") from error

    def start(self, words: Sequence[str], folder: Path) -> Command:
        where = folder.resolve(), self.threads, [*self.program], Path.cwd()
        job = self.executor.submit(Resumable(), [*words], *where)
        return SlurmJob(job, words[0], folder)

    def again(self, name: str, folder: Path) -> Command | None:
        found = SlurmJob(self.executor.job_class(self.folder, name), "fit", folder)
        if found.status() in (None, 0):
            return found
        # A job that a kill kept from the journal may still be in the folder: it holds the lock, and stops us.
        _free(folder)
        return None


class Ray:
    """Tasks of a Ray cluster, the one of RAY_ADDRESS or one of this machine; they end with this process.

    Args:
        options: of a task: `num_cpus`, `num_gpus`, `resources`, ...
        program: what is started with a command's words.

    Raises: ConfigError for an option that Ray does not know.
    """

    def __init__(self, options: Mapping[str, Any], program: Sequence[str] = PROGRAM) -> None:
        import ray

        self.program = program
        self.threads = max(1, int(options.get("num_cpus", 1)))
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            # What has ended is begun again here, where it is known how often.
            self.task = ray.remote(Resumable.__call__).options(**{"max_retries": 0, **options})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--backend ray: {' '.join(str(error).split())}") from error

    def start(self, words: Sequence[str], folder: Path) -> Command:
        _free(folder)
        # A task has a working directory of its own.
        where = folder.resolve(), self.threads, [*self.program], Path.cwd()
        task = self.task.remote(Resumable(), [*words], *where)
        return RayTask(task, words[0], folder)

    def again(self, name: str, folder: Path) -> None:
        return None


class RayTask:
    """One task of Ray as a command."""

    name = None

    def __init__(self, task: Any, command: str, folder: Path) -> None:
        self.task, self.command, self.folder = task, command, folder
        self._asked: float | None = None
        """When it was last asked to end."""

    def status(self) -> int | None:
        import ray
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError

        done, _ = ray.wait([self.task], timeout=0)
        if not done:
            # Ray tells a task once, and the interrupt can be lost where Python ignores exceptions.
            if self._asked is not None and time.monotonic() > self._asked + ASK_AGAIN_SECONDS:
                self.stop()
            return None
        try:
            return int(ray.get(self.task))
        except TaskCancelledError:
            return -signal.SIGTERM
        except RayTaskError:
            return 1
        except RayError:  # its worker or node is gone
            return -signal.SIGTERM

    def stop(self) -> None:
        import ray

        self._asked = time.monotonic()
        ray.cancel(self.task)

    def kill(self) -> None:
        import ray

        ray.cancel(self.task, force=True)  # what it has started ends with it

    def failure(self) -> str:
        return failure(self.command, self.status(), self.folder)


def _free(folder: Path) -> None:
    """Take over from a command that is known to have ended, on whatever node; of this machine's, the caller
    has asked already."""
    RunFolder.of(folder).lock.unlink(missing_ok=True)


class SlurmJob:
    """One job of submitit as a command."""

    def __init__(self, job: Any, command: str, folder: Path) -> None:
        self.job, self.command, self.folder = job, command, folder
        self.name: str | None = str(job.job_id)

    def status(self) -> int | None:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        if not self.job.done():
            return None
        try:
            return int(self.job.result())
        except UncompletedJobError:  # cancelled, or its node is gone: the command said nothing of itself
            return -signal.SIGTERM
        except FailedJobError:
            return 1

    def stop(self) -> None:
        self.job.cancel()

    def kill(self) -> None:
        """Slurm itself kills what does not end (KillWait)."""
        self.job.cancel()

    def failure(self) -> str:
        return f"job {self.name}: {failure(self.command, self.status(), self.folder)}"
