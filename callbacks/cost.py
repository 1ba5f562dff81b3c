"""What a run costs: passes per example by the paper's rule, tokens per second, peak memory.

One pass is one forward or one backward of one example. An attack says what it spent on each example
(arXiv 2405.15589, table 1 counts 10/10 for CAT's); all else is counted at the models as it happens: a
forward and a backward for each of an adversarial example's two replies, two for a utility example, what a
reference or a teacher scores, and, with the first step, reference scores that are computed before training.
What attacks took that training rows were collected with (red-team replay), and what generated them (a model's
own replies), stands beside it.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.run_folder.folder import RunFolder
from callbacks.run_folder.provenance import write_whole
from datamodules.batch import TrainingBatch
from datamodules.sources.base import Collected

COUNTED = (
    "adversarial_examples",
    "utility_examples",
    "attack_forward",
    "attack_backward",
    "passes",
    "tokens",
)
"""Totals over all processes; steps and seconds are the same on every one."""


class CostMonitor(Callback):
    """Counts passes and tokens, times the steps, and writes `cost.json` in the run folder; counts are of all
    processes and survive a resume."""

    def __init__(self) -> None:
        self._before = dict.fromkeys((*COUNTED, "steps", "seconds"), 0.0)
        """What the checkpoint that this process began from had counted, over all processes."""
        self._own: dict[str, Any] = dict.fromkeys((*COUNTED, "steps", "seconds"), 0.0)
        """What this process has counted since; passes and tokens are read when they are asked for."""
        self._began = 0.0

    @property
    def totals(self) -> dict[str, float]:
        """Over all processes; every process must ask together."""
        self._own = {name: float(count) for name, count in self._own.items()}
        own = [self._own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            own = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(own, self._own)
        counted = {name: self._before[name] + sum(counts[name] for counts in own) for name in COUNTED}
        seconds = self._before["seconds"] + max(counts["seconds"] for counts in own)
        return {"steps": self._own["steps"], **counted, "seconds": seconds}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TrainingBatch, batch_idx: int
    ) -> None:
        own = self._own
        own["passes"] += outputs["passes"].total
        if batch.adversarial is not None:
            attacked = outputs["attacked"]
            # Not read here: the host would wait for the GPU at every micro-batch.
            forward, backward = (
                attacked.forward_passes.sum().double(),
                attacked.backward_passes.sum().double(),
            )
            own["adversarial_examples"] += len(batch.adversarial)
            own["attack_forward"] += forward
            own["attack_backward"] += backward
            own["passes"] += forward + backward
        if batch.utility is not None:
            own["utility_examples"] += len(batch.utility)
        tokens, seconds = num_tokens(batch), time.perf_counter() - self._began
        own["tokens"] += tokens
        own["seconds"] += seconds
        own["steps"] = trainer.global_step
        # Logged as a sum over processes, of which each has the same count from before.
        passes = own["passes"] + self._before["passes"] / trainer.world_size
        counts = {"cost/tokens_per_second": tokens / seconds, "cost/passes": passes}
        pl_module.log_dict(counts, on_step=True, batch_size=1, sync_dist=True, reduce_fx="sum")
        memory = peak_memory_mib()
        pl_module.log(
            "cost/peak_memory_mib", memory, on_step=True, batch_size=1, sync_dist=True, reduce_fx="max"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        summary, path = self.summary(), RunFolder.of(trainer.default_root_dir).cost
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, Collected) and data.collecting_passes:
            summary["collecting_passes"] = data.collecting_passes
        # Asked to go on with a run that is finished: this process trained nothing whose peak could count.
        finished = path.is_file() and not self._own["seconds"]
        if trainer.is_global_zero and not finished:
            write_whole(path, json.dumps(summary, indent=2) + "\n")

    def summary(self) -> dict[str, float]:
        """Totals and what they mean per example and per second, over all processes."""
        totals = self.totals
        attacked = max(1.0, totals["adversarial_examples"])
        return {
            **totals,
            "attack_forward_per_example": totals["attack_forward"] / attacked,
            "attack_backward_per_example": totals["attack_backward"] / attacked,
            "tokens_per_second": totals["tokens"] / max(totals["seconds"], 1e-9),
            "peak_memory_mib": peak_memory_mib(),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.totals

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before.update(state_dict)
        self._own["steps"] = state_dict["steps"]


def num_tokens(batch: TrainingBatch) -> Float[Tensor, ""]:
    """Tokens of prompts and replies, padding left out."""
    rows, utility = batch.adversarial, batch.utility
    masks = [] if rows is None else [rows.prompt_mask, rows.harmful_mask, rows.safe_mask]
    masks += [] if utility is None else [utility.attention_mask]
    return torch.stack([mask.sum() for mask in masks]).sum().double()


def peak_memory_mib() -> float:
    """Peak of the device's allocated memory, or of this process's resident memory without one, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: a process started by another one inherits that one's peak there.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak_memory() -> None:
    """Start counting the peak anew, from what is in use now (CPU: Linux only)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
