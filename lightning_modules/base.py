"""What all fine-tuning modules share: the model is loaded late, checkpoints hold what learns, every step has
its own seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from datamodules.batch import EvaluationBatch
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig, has_adapter, load_seeded

PREDICTED_TOKENS = 64
"""Longest reply of `predict`."""


@dataclass
class OptimizerConfig:
    """AdamW with warm-up and decay; the defaults are those of the CAT authors' code."""

    lr: float = 2e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decays."""
    warmup_fraction: float = 0.03
    """Share of the training steps with linearly rising learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr: expected > 0, got {self.lr}; set a positive learning rate")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(
                f"optimizer.warmup_fraction: expected within [0, 1), got {self.warmup_fraction}; it "
                "is a share of all steps"
            )


class FineTuning(LightningModule):
    """Base of the training modules. Loads the model in `configure_model`, after the whole configuration has
    been checked.

    Args:
        base: the model to fine-tune.
        optimizer: learning rate and schedule.
        seed: base of every step's own seed.
    """

    model: nn.Module
    language_model: LanguageModel

    def __init__(self, base: ModelConfig, optimizer: OptimizerConfig | None = None, seed: int = 0) -> None:
        super().__init__()
        self.base = base
        self.optimizer_config = optimizer or OptimizerConfig()
        self.seed = seed
        # Adapter checkpoints hold the learning weights only; the rest comes from the base model.
        self.strict_loading = False

    @property
    def load_seed(self) -> int:
        """Seed of what is random about loading the model."""
        return step_seed(self.seed, -1, 0)

    def configure_model(self) -> None:
        """Load the model once, on first use."""
        if not hasattr(self, "model"):
            self.model = load_seeded(self.base, self.load_seed)
            data = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
            self.language_model = LanguageModel(self.model, chat=getattr(data, "chat", None))

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Seed dropout from (seed, micro-batch, rank): resuming is bit-exact and callbacks cannot disturb
        training."""
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(step_seed(self.seed, number, self.global_rank))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.optimizer_config
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            learning, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(config, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop frozen weights from the checkpoint where only adapters learn."""
        if has_adapter(self.model):
            learning = {name for name, p in self.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in learning}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint holds exactly the weights that learn here.

        Raises: ValueError naming a missing or unknown weight.
        """
        learning = {name for name, p in self.named_parameters() if p.requires_grad}
        missing, unknown = (
            learning - set(checkpoint["state_dict"]),
            set(checkpoint["state_dict"]) - set(self.state_dict()),
        )
        if missing or unknown:
            name = sorted(missing | unknown)[0]
            raise ValueError(
                f"the checkpoint does not fit this model: {len(missing)} weights missing, "
                f"{len(unknown)} unknown, e.g. {name!r}; "
                "use the configuration that the run folder's config.yaml holds"
            )

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Nothing batch by batch: `validate` and `test` are the evaluation callbacks' work, which report n
        and an interval."""

    test_step = validation_step

    def predict_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, str]]:
        """Greedy replies to a batch of evaluation prompts, as text."""
        chat = self.trainer.datamodule.chat  # type: ignore[attr-defined]
        with torch.no_grad():
            embeds = self.language_model.embed(batch.prompt_ids)
        replies = self.language_model.generate(embeds, batch.prompt_mask, PREDICTED_TOKENS, chat.stop_ids)
        return [
            {"key": key, "prompt": prompt, "reply": chat.decode(ids)}
            for key, prompt, ids in zip(batch.keys, batch.prompts, replies, strict=True)
        ]


def schedule(config: OptimizerConfig, total: int) -> Callable[[int], float]:
    """Learning rate factor by step: linear warm-up, then the configured decay over `total` steps.

    A plain function: LambdaLR would store an object in the checkpoint, which then could not be loaded as
        weights only.
    """
    warmup = math.ceil(config.warmup_fraction * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1.0 - done, "constant": 1.0}[
            config.schedule
        ]
        return config.final_fraction + (1 - config.final_fraction) * shape

    return factor


def step_seed(seed: int, step: int, rank: int) -> int:
    """63-bit seed of one (run seed, step, rank)."""
    return (
        int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest(), "big") >> 1
    )
