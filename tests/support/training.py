"""Short trainings on the packaged model, and what they computed, for tests that compare trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from callbacks.evaluations.base import introduce
from datamodules.adversarial import AdversarialData
from datamodules.batch import TrainingBatch
from datamodules.evaluation import EvaluationSets
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from datamodules.text.encoding import EncodingConfig
from datamodules.text.tokenizers import TokenizerConfig
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.base import OptimizerConfig
from lightning_modules.losses.toward_away import TowardAwayUtility
from lightning_modules.models.loading import LoraSettings, ModelConfig

ATTACK = {"epsilon": 0.1, "num_steps": 3, "step_size": 0.5, "keep": "last"}


def data(
    micro_batches: int = 1, evaluation: bool = False, num_harmful: int | None = None, **changes: Any
) -> AdversarialData:
    """Of the packaged corpus; `num_harmful` rows of it where a reference scores them all beforehand."""
    sets = EvaluationSets(
        [TinyChatHarmful("validation")],
        [TinyChatBenign("validation", 20)],
        [TinyChatBenign("validation", 20)],
    )
    fields: dict[str, Any] = {
        "harmful_per_step": 4,
        "utility_per_step": 8,
        "encoding": EncodingConfig(160),
        "micro_batches": micro_batches,
    }
    return AdversarialData(
        TokenizerConfig("tinychat:aligned"),
        harmful=[TinyChatHarmful("train", limit=num_harmful)],
        utility=[TinyChatBenign("train", 300)],
        evaluation=sets if evaluation else None,
        **(fields | changes),
    )


def module(lora: LoraSettings | None = None, lr: float = 1e-3, **attack: Any) -> AdversarialFineTuning:
    return AdversarialFineTuning(
        ModelConfig("tinychat:aligned", lora=lora),
        EmbeddingPGD(**(ATTACK | attack)),
        TowardAwayUtility(cutoff_toward=0.05, cutoff_away=-2.0),
        optimizer=OptimizerConfig(lr=lr, warmup_fraction=0.0, schedule="constant"),
    )


class _Trainer(Trainer):
    """Introduces data and module to each other, as the command line does."""

    def fit(self, model: Any, datamodule: Any, **fields: Any) -> None:  # type: ignore[override]
        introduce(model, datamodule, self.callbacks)  # type: ignore[attr-defined]
        super().fit(model, datamodule=datamodule, **fields)


def trainer(folder: Path, steps: int, *callbacks: Callback, micro_batches: int = 1, **fields: Any) -> Trainer:
    fields = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    } | fields
    return _Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        default_root_dir=folder,
        callbacks=list(callbacks),
        inference_mode=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=micro_batches,
        gradient_clip_val=0.3,
        limit_val_batches=0,
        **fields,
    )


def weights(fitted: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in fitted.model.named_parameters() if p.requires_grad}


class Batches(Callback):
    """Keeps the batches and losses that training saw."""

    def __init__(self) -> None:
        self.batches: list[TrainingBatch] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: TrainingBatch, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


class InDouble(Callback):
    """Trains in float64: Adam's first steps are signs, so fp32 noise in a vanishing gradient would move a
    weight by the rate."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.double()


def double_norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Llama's norm without its detour through fp32."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@dataclass
class Computed:
    """What a run computed: Adam's weights alone would hide a factor of the loss."""

    weights: dict[str, torch.Tensor]
    losses: list[float]
    """Of each micro-batch."""
    gradients: list[dict[str, torch.Tensor]]
    """Of each step, before clipping."""


class Gradients(Callback):
    """Keeps the gradients of each step before they are clipped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.steps.append(gradients(pl_module.model))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
