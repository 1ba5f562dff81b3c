"""Whether the processes of a Slurm job are those that the trainer expects."""

from __future__ import annotations

import os

from callbacks.run_folder.slurm_job import in_shell, started_by_srun
from experiments.config.errors import ConfigError


def check_started() -> None:
    """Raises: ConfigError for one of several tasks that would wait for the others in vain."""
    if "SLURM_JOB_ID" not in os.environ or in_shell():
        return
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    tasks = int(os.environ.get("SLURM_NTASKS", nodes * int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))))
    if tasks > 1 and "SLURM_STEP_ID" not in os.environ:
        raise ConfigError(
            f"SLURM_STEP_ID: the job has {tasks} tasks, and this process was not started by srun as one of "
            "them; write srun in front of the command, as configs/trainer/slurm.sh does"
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError(
            f"SLURM_NTASKS_PER_NODE: expected the tasks on each node, got none for {tasks} tasks; submit "
            f"with --nodes={nodes} --ntasks-per-node={tasks // nodes} instead of --ntasks"
        )


def check_tasks(devices: int, nodes: int) -> None:
    """Raises: ConfigError where the processes that srun has started are not those that the trainer expects:
    they would wait for each other, or each train the whole run."""
    if not started_by_srun():
        return
    tasks, on = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
    remedy = "set it, or add --config configs/trainer/slurm.yaml, which takes it from the job"
    if nodes != on:
        raise ConfigError(f"trainer.num_nodes: expected {on}, the job's nodes, got {nodes}; {remedy}")
    if devices * nodes != tasks:
        raise ConfigError(
            f"trainer.devices: expected {tasks // on}, the job's tasks on each node, got {devices}; "
            f"{remedy}, or submit with --ntasks-per-node={devices}"
        )
