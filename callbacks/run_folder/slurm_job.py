"""What Slurm says of the job that this process belongs to, and how the job is put back into the queue."""

from __future__ import annotations

import os
import subprocess

REQUEUE_SECONDS = 20.0
"""How long the scheduler may take to answer."""


def started_by_srun() -> bool:
    """Whether srun started this process, as one of a job's tasks.

    A job's shell has the job's variables too.
    """
    return {"SLURM_JOB_ID", "SLURM_NTASKS"} <= os.environ.keys() and not in_shell()


def in_shell() -> bool:
    """Whether this is a job's interactive shell (`srun --pty bash`, salloc), as Lightning decides it too,
    which starts the processes itself there."""
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def job_id() -> str | None:
    """What `scontrol` calls the job; None outside of Slurm."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    # One job of an array has the whole array's number for its own: it would put all of them back.
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often the job was put back before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def requeue() -> str:
    """Put the job back into the queue. Returns what came of it, in one line."""
    words = ["scontrol", "requeue", job_id() or ""]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=REQUEUE_SECONDS)
        refusal = done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        refusal = str(error)
    if refusal is None:
        return f"{' '.join(words)}: the job is queued again, and goes on from its newest checkpoint"
    refusal = " ".join(refusal.split())
    return f"{' '.join(words)}: {refusal}; submit the job again: it goes on from its newest checkpoint"
