"""What a run costs: passes per example by the paper's rule, tokens per second, peak memory.

One pass is one forward or one backward of one example. An attack says what it spent on each example
(arXiv 2405.15589, table 1 counts 10/10 for CAT's); all else is counted at the models as it happens: a
forward and a backward for each of an adversarial example's two replies, two for a utility example, what a
reference or a teacher scores, and, with the first step, reference scores that are computed before training.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from datamodules.batch import TrainingBatch

COST_FILE = "cost.json"


class CostMonitor(Callback):
    """Counts passes and tokens, times the steps, and writes `cost.json` in the run folder; counts survive a
    resume."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = dict.fromkeys(
            (
                "steps",
                "adversarial_examples",
                "utility_examples",
                "attack_forward",
                "attack_backward",
                "passes",
                "tokens",
                "seconds",
            ),
            0.0,
        )
        self._began = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TrainingBatch, batch_idx: int
    ) -> None:
        totals = self.totals
        tokens = 0
        totals["passes"] += outputs["passes"].total
        if batch.adversarial is not None:
            attacked, size = outputs["attacked"], len(batch.adversarial)
            forward, backward = int(attacked.forward_passes.sum()), int(attacked.backward_passes.sum())
            totals["adversarial_examples"] += size
            totals["attack_forward"] += forward
            totals["attack_backward"] += backward
            totals["passes"] += forward + backward
            tokens += sum(
                int(m.sum())
                for m in (
                    batch.adversarial.prompt_mask,
                    batch.adversarial.harmful_mask,
                    batch.adversarial.safe_mask,
                )
            )
        if batch.utility is not None:
            totals["utility_examples"] += len(batch.utility)
            tokens += int(batch.utility.attention_mask.sum())
        seconds = time.perf_counter() - self._began
        totals["tokens"] += tokens
        totals["seconds"] += seconds
        totals["steps"] = trainer.global_step
        pl_module.log_dict(
            {
                "cost/tokens_per_second": tokens / seconds,
                "cost/passes": totals["passes"],
                "cost/peak_memory_mib": peak_memory_mib(),
            },
            on_step=True,
            batch_size=1,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / COST_FILE).write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8")

    def summary(self) -> dict[str, float]:
        """Totals and what they mean per example and per second (this process)."""
        totals, attacked = self.totals, max(1.0, self.totals["adversarial_examples"])
        return {
            **totals,
            "attack_forward_per_example": totals["attack_forward"] / attacked,
            "attack_backward_per_example": totals["attack_backward"] / attacked,
            "tokens_per_second": totals["tokens"] / max(totals["seconds"], 1e-9),
            "peak_memory_mib": peak_memory_mib(),
        }

    def state_dict(self) -> dict[str, Any]:
        return dict(self.totals)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals.update(state_dict)


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
