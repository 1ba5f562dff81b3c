"""What all training modules share: the optimiser with its schedule, and a seed of its own for every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from datamodules.fields import Fraction, NonNegative, NonNegativeInt, Positive, Probability, checked
from lightning_modules.defences.base import Defence
from lightning_modules.models.loading import ModelConfig
from lightning_modules.pretrained import PretrainedModel, step_seed


@checked
@dataclass
class OptimizerConfig:
    """AdamW with warm-up and decay; the defaults are those of the CAT authors' code."""

    lr: Positive = 2e-4
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam's moment decays."""
    warmup_fraction: Fraction = 0.03
    """Share of the training steps with linearly rising learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    final_fraction: Probability = 0.0
    """Learning rate at the end, as a share of the peak."""
    fused: bool | None = None
    """One kernel a step for all weights together (null: no); not under fp16 with clipped gradients."""


@checked
class FineTuning(PretrainedModel):
    """Base of the training modules.

    Args:
        base: the model to fine-tune.
        optimizer: learning rate and schedule.
        seed: base of every step's own seed; null takes seed_everything's.
        defence: what stands around the model in `validate`, `test` and `predict`; training knows none.
    """

    def __init__(
        self,
        base: ModelConfig,
        optimizer: OptimizerConfig | None = None,
        seed: NonNegativeInt | None = None,
        defence: Defence | None = None,
    ) -> None:
        super().__init__(base, seed, defence=defence)
        self.optimizer_config = optimizer or OptimizerConfig()

    def setup(self, stage: str) -> None:
        """Raises: ValueError, before the model is loaded, where a fused optimiser's gradients would be
        clipped as fp16's scaler left them."""
        super().setup(stage)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        clipped = stage == "fit" and scaler is not None and self.trainer.gradient_clip_val
        if self.optimizer_config.fused and clipped:
            raise ValueError(
                f"model.optimizer.fused: under trainer.precision {self.trainer.precision} a fused "
                "optimiser's gradients cannot be clipped; set fused: false, or trainer.precision: bf16-mixed"
            )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning clips no gradients of a fused optimiser under any mixed precision; of bf16, which is not
        scaled, they can be."""
        plugin = self.trainer.precision_plugin
        if self.optimizer_config.fused and isinstance(plugin, MixedPrecision) and gradient_clip_val:
            how = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, how)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def step_seed(self) -> int:
        """Seed of this micro-batch on this process: a resumed run draws what an uninterrupted one would."""
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        return step_seed(self.seed, number, self.global_rank)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Seed dropout from (seed, micro-batch, rank): resuming is bit-exact and callbacks cannot disturb
        training."""
        torch.manual_seed(self.step_seed())

    def on_after_backward(self) -> None:
        """Raises: ValueError where weights had no gradient under DDP, which then waits for them and sums
        nobody's; it would say so a step, and perhaps a checkpoint, later."""
        wrapped = self.trainer.strategy.model
        if not isinstance(wrapped, DistributedDataParallel):
            return
        if wrapped.find_unused_parameters or wrapped.static_graph:
            return
        without = [name for name, p in self.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            raise ValueError(
                f"trainer.strategy: expected a gradient of every learning weight under ddp, got none of "
                f"{len(without)}, e.g. {without[0]}; set base.lora.layers to those that the loss reaches, or "
                "trainer.strategy: ddp_find_unused_parameters_true"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.optimizer_config
        learning = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            learning,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=config.fused or None,
        )
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(config, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


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
