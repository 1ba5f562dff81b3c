"""The two sides of the benchmarks: our attack and training step, and the public code's schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from datamodules.batch import AdversarialBatch, UtilityBatch
from experiments.benchmarks import training_yardstick
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.losses.toward_away import TowardAwayUtility
from lightning_modules.models.embeddings import mean_embedding_norm
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.scoring import score_replies, score_utility

STEPS = 10
EPSILON, STEP = 0.05, 1e-3


def build_model(vocabulary: int) -> nn.Module:
    """A random Llama with LoRA r 64 on all linear layers: 19.4 M parameters at V = 32,000, of which the body
    is 7.1 M."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=384, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    lora = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(LlamaForCausalLM(config), lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.train()


class Ours:
    """This project's attack and training step; `merge_rounded` as of `LanguageModel`."""

    def __init__(
        self,
        model: nn.Module,
        adversarial: AdversarialBatch,
        utility: list[UtilityBatch],
        merge_rounded: bool = False,
    ) -> None:
        self.model = LanguageModel(model, merge_rounded=merge_rounded)
        self.adversarial, self.utility = adversarial, utility
        self.pgd = EmbeddingPGD(
            epsilon=EPSILON,
            num_steps=STEPS,
            step_size=STEP,
            step_unit="absolute",
            step_rule="sign",
            keep="last",
        )
        self.objective = TowardAwayUtility()

    def attack(self) -> AttackedPrompt:
        return self.pgd(self.model, self.adversarial)

    def losses(self, attacked: AttackedPrompt) -> Iterator[Tensor]:
        """The losses of a step's micro-batches, each to be differentiated before the next is asked for."""
        yield self.objective.adversarial(score_replies(self.model, self.adversarial, attacked)).loss.mean()
        for utility in self.utility:
            yield self.objective.utility(*score_utility(self.model, utility)).loss.mean() / len(self.utility)

    def step(self) -> Step:
        return timed_step(self.model.module, self.attack, self.losses)


class Public:
    """The public code's attack and training step.

    Args:
        model: as ours.
        adversarial: the step's adversarial rows.
        utility: its utility rows.
        size: rows of both kinds in a micro-batch, drawn at random; None keeps the kinds apart.
    """

    def __init__(
        self,
        model: nn.Module,
        adversarial: AdversarialBatch,
        utility: list[UtilityBatch],
        size: int | None = None,
    ) -> None:
        self.model = model
        if size is None:
            self.micro_batches = training_yardstick.apart(adversarial, utility)
        else:
            self.micro_batches = training_yardstick.interleaved(adversarial, utility, size)
        self.rows = len(adversarial), sum(map(len, utility))
        self.radius = EPSILON * mean_embedding_norm(LanguageModel(model))

    def attack(self) -> list[Tensor | None]:
        """One perturbation for each micro-batch that holds adversarial rows."""
        step = torch.tensor(STEP)
        return [
            None
            if part.harmful is None
            else training_yardstick.attack(self.model, part.harmful, STEPS, self.radius, step)
            for part in self.micro_batches
        ]

    def losses(self, deltas: list[Tensor | None]) -> Iterator[Tensor]:
        """As `Ours.losses`: each micro-batch's kinds are differentiated together, and there is no empty
        one."""
        for part, delta in zip(self.micro_batches, deltas, strict=True):
            terms = []
            if delta is not None:
                losses = training_yardstick.adversarial_losses(self.model, part, delta)
                terms.append(losses.sum() / self.rows[0])
            if part.utility is not None:
                losses = training_yardstick.utility_losses(self.model, part.utility)
                terms.append(losses.sum() / self.rows[1])
            yield torch.stack(terms).sum()

    def by_example(self, deltas: list[Tensor | None]) -> list[Tensor]:
        """The perturbation of each adversarial row, (L, D), in our order."""
        found: dict[int, Tensor] = {}
        for part, delta in zip(self.micro_batches, deltas, strict=True):
            found |= {} if delta is None else dict(zip(part.examples, delta, strict=True))
        return [found[i] for i in range(len(found))]

    def step(self) -> Step:
        return timed_step(self.model, self.attack, self.losses)


@dataclass
class Step:
    """One training step: its loss, the perturbation it trained under, and the seconds spent on finding
    that."""

    loss: float
    perturbation: Any
    attack_seconds: float


def timed_step(
    model: nn.Module, attack: Callable[[], Any], losses: Callable[[Any], Iterator[Tensor]]
) -> Step:
    """Attack, then a backward pass per micro-batch; gradients are dropped, as an optimiser step would leave
    them."""
    began = time.perf_counter()
    perturbation = attack()
    seconds, total = time.perf_counter() - began, 0.0
    for loss in losses(perturbation):
        loss.backward()
        total += loss.item()
    model.zero_grad()
    return Step(total, perturbation, seconds)
