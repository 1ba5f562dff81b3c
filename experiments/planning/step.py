"""One optimiser step of the shipped training, with its memory and floating-point operations counted.

Lightning's own loop runs the module's `training_step`, attack included, then clips and steps the optimiser;
with `ShapesOnly` tensors there are neither weights nor arithmetic, with ordinary ones it is a measurement.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from datamodules.batch import AdversarialBatch, TrainingBatch
from experiments.planning.memory import ACTIVATIONS, ATTACK, GRADIENTS, OPTIMISER, Counted
from experiments.planning.shapes_only import ShapesOnly, without_weights
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.base import Attack, AttackedPrompt
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.progress import observed
from lightning_modules.losses.base import ReferenceScores
from lightning_modules.models.decoder import causal_lm, text_config
from lightning_modules.models.language_model import LanguageModel

ITERATIONS = 3
"""Of a planned attack: the last one has a whole one before it."""
TRAINER = ("precision", "gradient_clip_val", "gradient_clip_algorithm")
"""Fields of the run's trainer that a step's cost depends on."""
SPEAKERS = ("pytorch.utilities.rank_zero", "fabric.utilities.seed")
"""Lightning's loggers of what it runs on."""


@dataclass
class StepCost:
    """What a planned or measured training costs. Bytes, and floating-point operations."""

    peaks: dict[str, Counter[str]] = field(default_factory=dict)
    """What was alive, bytes by part, when it was the most while a part was worked on."""
    parameters: int = 0
    trained: int = 0
    persistent: Counter[str] = field(default_factory=Counter)
    """Bytes by part between two steps."""
    flops: Counter[str] = field(default_factory=Counter)
    """Floating-point operations of all micro-batches: `attack` and `outer`."""
    sweeps: Counter[str] = field(default_factory=Counter)
    """Passes over all layers, forward and backward ones; likewise."""

    @property
    def at_peak(self) -> Counter[str]:
        """Bytes by part at the highest peak."""
        return max(self.peaks.values(), key=Counter.total)

    @property
    def peak(self) -> int:
        return self.at_peak.total()


class _Batches(torch.utils.data.Dataset[TrainingBatch]):
    def __init__(self, batches: Sequence[TrainingBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> TrainingBatch:
        return self.batches[number]


class _Parts(Callback):
    """Tells the counters which part of a step is worked on, and how often a micro-batch stands in it."""

    def __init__(self, memory: Counted, times: Sequence[tuple[int, int]]) -> None:
        self.memory, self.times = memory, times
        self._before: list[Counter[str]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._before = [self.memory.flops.copy(), self.memory.sweeps.copy()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        attacks, times = self.times[batch_idx % len(self.times)]
        for counts, before in zip((self.memory.flops, self.memory.sweeps), self._before, strict=True):
            for part, number in (counts - before).items():
                counts[part] += ((attacks if part == ATTACK else times) - 1) * number

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(self._stepped)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.memory.part = OPTIMISER

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.memory.call(parameter.grad, GRADIENTS)

    def _stepped(self, *_: Any) -> None:
        self.memory.part = ACTIVATIONS


class _CountedAttack:
    """The run's attack; what it allocates and computes is counted as the attack's.

    A descent computes the same at every iteration: where nothing is computed, ITERATIONS of them are executed
    and the operations of the others are those of the last one executed. Memory does not grow with them.
    """

    def __init__(self, attack: Attack, counted: Counted, shorten: bool) -> None:
        self.attack, self.counted, self.left_out = attack, counted, 0
        if shorten and type(attack) is EmbeddingPGD and attack.num_steps > ITERATIONS:
            self.attack, self.left_out = copy.copy(attack), attack.num_steps - ITERATIONS
            self.attack.num_steps = ITERATIONS

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        marks: list[int] = []
        with self.counted.working_on(ATTACK), observed(lambda *_: marks.append(self.counted.flops[ATTACK])):
            attacked = self.attack(model, batch, rng)
        if self.left_out:
            self.counted.flops[ATTACK] += self.left_out * (marks[ITERATIONS - 1] - marks[ITERATIONS - 2])
            self.counted.sweeps[ATTACK] += 2 * self.left_out
        return attacked


def count_step(
    module: AdversarialFineTuning,
    micro_batches: Sequence[TrainingBatch],
    trainer: Mapping[str, Any],
    steps: int = 1,
    mode: ShapesOnly | None = None,
    times: Sequence[tuple[int, int]] | None = None,
) -> StepCost:
    """Train on these micro-batches and count.

    Args:
        module: its model is built already: on the meta device where `mode` is given, else with weights.
        micro_batches: of one optimiser step.
        trainer: fields of the run's trainer.
        steps: optimiser steps, each on the same micro-batches; the optimiser's state is there from the second
            on.
        mode: counts shapes instead of computing.
        times: how many of a step's micro-batches attack as each of these does, and how many train as it does;
            null is each once.

    Raises: UnknownValue where the step decides by a value that a plan has not.
    """
    model = module.model
    with ExitStack() as stack, calm():
        if mode is not None:
            without_weights(model, mode)
            stack.enter_context(mode)
        counted = stack.enter_context(Counted(model, text_config(model).vocab_size))
        hook = causal_lm(model).get_decoder().register_forward_hook(counted.swept)
        stack.callback(hook.remove)
        attack = module.attack
        module.attack = _CountedAttack(attack, counted, shorten=mode is not None)
        fit(module, micro_batches, trainer, steps, _Parts(counted, times or [(1, 1)] * len(micro_batches)))
        module.attack = attack
        parameters = list(model.parameters())
        return StepCost(
            peaks={part: +held for part, held in counted.peaks.items()},
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            persistent=+counted.live,
            flops=Counter({part: number // steps for part, number in counted.flops.items()}),
            sweeps=Counter({part: number // steps for part, number in counted.sweeps.items()}),
        )


def fit(
    module: AdversarialFineTuning,
    micro_batches: Sequence[TrainingBatch],
    trainer: Mapping[str, Any],
    steps: int,
    *callbacks: Callback,
) -> None:
    """Lightning's training loop around the module's own steps, on the CPU; nothing is logged or evaluated."""
    # The weights are where they belong, and `Module.to` does not take those that hold nothing.
    module._apply = lambda *_, **__: module  # type: ignore[method-assign, assignment]
    # What is logged is read from tensors, of which a plan's hold nothing.
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    # Before the first step, from weights: only their number counts here.
    module._scored_by_reference = lambda: _no_scores  # type: ignore[method-assign]
    own = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=len(micro_batches),
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{name: trainer[name] for name in TRAINER if trainer.get(name) is not None},
    )
    own.fit(module, train_dataloaders=DataLoader(_Batches(micro_batches), batch_size=None))


def _no_scores(rows: AdversarialBatch) -> ReferenceScores:
    nothing = torch.zeros(len(rows), dtype=torch.float64)
    return ReferenceScores(nothing, nothing)


@contextmanager
def calm() -> Iterator[None]:
    """Without Lightning's words on the machine it runs on, and on seeds."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in SPEAKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
