"""One writer per run folder: a lock file that names the process which holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from callbacks.run_folder.folder import RunError, RunFolder
from callbacks.run_folder.slurm_job import job_id, restarts


class RunLock:
    """Holds a run folder while a context lasts. Only the first process of a run takes it.

    A dead owner's lock is taken over: its host is this one and no process has its number and start time, or
    it was of this very job before Slurm put it back into the queue. Whether another process of another host
    lives cannot be known from here, so its lock is refused.

    Args:
        folder: the run folder; made if it is missing.

    Raises (on entering): RunError naming the owner and the remedy.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = RunFolder.of(folder).lock
        self._held = False

    def __enter__(self) -> RunLock:
        # Here, for who only asks about a lock, as each of Ray's actors, would spend five seconds on it.
        from lightning.pytorch.utilities import rank_zero_only

        if rank_zero_only.rank in (0, None):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        return self

    def __exit__(self, *error: object) -> None:
        # The folder may have been moved aside or removed meanwhile.
        if self._held and self.path.exists():
            with _exclusive(self.path) as stream:
                if _record(stream.read()) == _own():
                    self.path.unlink()
        self._held = False

    def _take(self) -> None:
        with _exclusive(self.path) as stream:
            owner = _record(stream.read())
            if owner:
                self._refuse_living(owner)
            stream.seek(0)
            stream.truncate()
            stream.write(json.dumps(_own()))
            stream.flush()
            os.fsync(stream.fileno())
        self._held = True

    def _refuse_living(self, owner: dict[str, Any]) -> None:
        host, pid = owner.get("host"), owner.get("pid")
        if _before_requeue(owner):
            return
        if host != socket.gethostname():
            raise RunError(
                f"{self.path.parent}: in use by process {pid} on {host}; wait for it, choose another folder, "
                f"or remove {self.path} if that process is gone"
            )
        if _lives(owner):
            raise RunError(
                f"{self.path.parent}: in use by process {pid} on this machine; wait for it or stop it, or "
                "choose another folder with --trainer.default_root_dir=FOLDER"
            )


def in_use(folder: str | Path) -> bool:
    """Whether a living process of this machine holds a run folder."""
    owner = _owner(folder)
    return owner.get("host") == socket.gethostname() and _lives(owner)


def held_elsewhere(folder: str | Path) -> bool:
    """Whether a process of another machine has left its lock; from here nobody can tell whether it lives."""
    owner = _owner(folder)
    return bool(owner) and owner.get("host") != socket.gethostname()


def release(folder: str | Path) -> None:
    """Take over from a command that is known to have ended, on whatever node; whether one of this machine
    lives the caller has asked already."""
    RunFolder.of(folder).lock.unlink(missing_ok=True)


def _owner(folder: str | Path) -> dict[str, Any]:
    """Whom a folder's lock names; nobody without one."""
    try:
        return _record(RunFolder.of(folder).lock.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _lives(owner: dict[str, Any]) -> bool:
    """Whether an owner of this machine is still there."""
    pid = owner.get("pid")
    return isinstance(pid, int) and owner.get("started") == process_start(pid)


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in its own units; None where there is none with this number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None if Path("/proc/self").exists() else _start_without_proc(pid)
    # The process's name, in brackets, may hold spaces and brackets itself. Behind it stand the state (field 3
    # of proc(5)) and the start (field 22), which counts from the machine's boot.
    state, start = fields.rpartition(")")[2].split()[0], fields.rpartition(")")[2].split()[19]
    # A killed process whose parent has not fetched its status writes nothing any more.
    return None if state in "ZX" else f"{boot}/{start}"


def _start_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)  # asks whether it is there, sends nothing
    except ProcessLookupError:
        return None
    except PermissionError:  # it is there and belongs to somebody else
        pass
    return "alive"


def _before_requeue(owner: dict[str, Any]) -> bool:
    """Whether the owner was of this job of Slurm's, in an earlier start of it: a job begins again, maybe on
    another host, when all of its processes are gone."""
    job, restart = owner.get("job"), owner.get("restart")
    return job is not None and job == job_id() and isinstance(restart, int) and restart < restarts()


def _own() -> dict[str, Any]:
    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": process_start(os.getpid())}
    return own if job_id() is None else own | {"job": job_id(), "restart": restarts()}


def _record(text: str) -> dict[str, Any]:
    """The owner, or nothing where a kill cut the record short: then its writer is dead."""
    try:
        owner = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return owner if isinstance(owner, dict) else {}


@contextmanager
def _exclusive(path: Path) -> Iterator[Any]:
    """The file open for reading and writing, while no other process reads or changes it."""
    while True:
        stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
            # Its last owner may have removed the file between the two calls.
            if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
                yield stream
                return
        finally:
            stream.close()
