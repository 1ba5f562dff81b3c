#!/bin/bash
# Copy it, write your RECIPE and what you want of the cluster, and submit it from the project's folder: sbatch slurm.sh
#SBATCH --job-name=thundercat
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8        # one process a device
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00            # a run may be longer: the job comes back until it is done
#SBATCH --signal=USR1@90           # 90 s before the end, to the processes of srun (not B:, which is this shell); preemption sends it
#                                    too where the cluster sets PreemptParameters=send_user_signal
#SBATCH --requeue                  # may be queued again: by us, by a preempting Slurm, after a failed node
#SBATCH --open-mode=append         # the log of the first start stays
#SBATCH --output=slurm_%x_%j.log
# A name of `bash` or `interactive` would mean a shell: Lightning then starts the processes by itself.

# The run folder and the files that the recipe reads must lie on a file system that all nodes see.
cd "$SLURM_SUBMIT_DIR" || exit 1
# `last` is the newest whole checkpoint of the run's folder; the first start finds none, says so and begins.
exec srun --kill-on-bad-exit=1 thundercat fit --config RECIPE --config configs/trainer/slurm.yaml --ckpt_path=last "$@"
