"""A Slurm job that must make room writes a checkpoint, ends, and is put back into the queue.

Lightning's own way does not lead back to the same weights. Its handler saves wherever the signal finds the
process, in the middle of a step or of an evaluation, where each process stands elsewhere; under another name
than the run's checkpoints; and trains on. The command line switches it off.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from callbacks.run_folder.checkpoints import RunCheckpoints
from callbacks.run_folder.slurm_job import requeue, started_by_srun
from callbacks.run_folder.stopping import Stopped
from datamodules.fields import Positive, checked

log = logging.getLogger(__name__)
SIGNAL = signal.SIGUSR1
LOOKS_SECONDS = 0.5
"""Between two looks at whether the run has ended."""


class Preempted(Stopped):
    """The scheduler wants its devices back, and the checkpoint is written."""

    def __init__(self, callback: RequeuesJob) -> None:
        super().__init__(SIGNAL)
        self._callback = callback

    @property
    def exit_status(self) -> int:
        """Only the first process's is of a run that is not done: at another's, srun would end the first while
        it puts the job back (`--kill-on-bad-exit`)."""
        return super().exit_status if self._callback.first else 0

    def put_back(self) -> str:
        """The job, into the queue; the last that a process does. Returns what came of it."""
        return self._callback.put_back()


@checked
class RequeuesJob(Checkpoint):
    """At SIGUSR1 in a job of Slurm's (`sbatch --signal=USR1@90`) the run's own checkpoint is written at the
    end of the step, all processes end, and the first puts the job back.

    Outside of such a job it does nothing. SIGTERM does not requeue: scancel sends it as well, and a
    preempting Slurm requeues by itself.

    Args:
        seconds: a step, or an evaluation, that lasts for longer after the signal is cut off there: the job
            goes on from the checkpoint before. Less than what Slurm gives between the signal and the end.
    """

    # A Checkpoint, for Lightning calls these last: whatever a step brings has been done by then.

    def __init__(self, seconds: Positive = 60.0) -> None:
        self.seconds = seconds
        self._asked, self._over = threading.Event(), threading.Event()
        self._once = threading.Lock()
        self.first = True
        self._listens = False
        self._seen_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen. Raises: ValueError where a training has no checkpoints of its own."""
        if stage == "fit" and self._checkpoints(trainer) is None:
            raise ValueError(
                "trainer.callbacks: RequeuesJob found no RunCheckpoints, whose checkpoint a job goes on "
                "from; add --config configs/trainer/default.yaml in front"
            )
        self._listens = started_by_srun()
        if not self._listens:
            return
        self.first = trainer.is_global_zero
        self._over.clear()
        # A thread of its own waits for the signal: the main one may stand in a collective, where no handler
        # of Python's runs. `experiments/process.py` blocks it before there are threads that would take it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])
        threading.Thread(target=self._listen, daemon=True, name="requeue").start()

    def _listen(self) -> None:
        while signal.sigtimedwait([SIGNAL], LOOKS_SECONDS) is None:
            if self._over.is_set():
                return
        # A second signal is never looked for.
        self._asked.set()
        log.warning("%s: ends after this step, in %g s at the latest", SIGNAL.name, self.seconds)
        # The others are ended by the scheduler, or by this one's absence: one that ended by itself before
        # the job is put back could have srun end the first.
        if not self._over.wait(self.seconds) and self.first:
            print(f"thundercat: stopped by {SIGNAL.name} within a step; {self.put_back()}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(128 + SIGNAL)

    def put_back(self) -> str:
        self._once.acquire()  # whoever comes second waits for the end of the process
        return requeue() if self.first else "the first process puts the job back"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if not self._listens:
            return
        # Between two steps of an accumulation there is nothing to resume from.
        stepped, self._seen_step = trainer.global_step != self._seen_step, trainer.global_step
        # The signal reaches the processes one after the other, and they must save together.
        if stepped and trainer.strategy.reduce_boolean_decision(self._asked.is_set(), all=False):
            checkpoints = self._checkpoints(trainer)
            assert checkpoints is not None
            checkpoints.save(trainer)
            raise Preempted(self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # A run that fails, or that somebody ends, stays ended.
        if not isinstance(exception, Preempted):
            self._over.set()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._over.set()

    @staticmethod
    def _checkpoints(trainer: Trainer) -> RunCheckpoints | None:
        own = (one for one in trainer.checkpoint_callbacks if isinstance(one, RunCheckpoints))
        return next(own, None)
