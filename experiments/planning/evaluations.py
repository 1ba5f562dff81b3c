"""What a run's evaluations inside `fit` compute: the replies that they ask for, and the searches before them.

Counted are passes over whole rows: what an attack shares between candidates saves time, and a reply may end
early, so a run computes less. What is asked of rows whose number only the data knows, and searches whose
length nobody can say beforehand, are named instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback
from torch import nn

from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.benign import AWAY_FROM_ANSWER, TOWARDS_REFUSAL
from callbacks.evaluations.probe import Probe
from experiments.planning.memory import Counted
from experiments.planning.shapes_only import ShapesOnly
from experiments.planning.step import calm
from lightning_modules.attacks.base import Attack
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt
from lightning_modules.attacks.suffix.adaptive import AdaptiveGCG
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.initial_suffix import InitialSuffix
from lightning_modules.attacks.text.rewrites import DirectRequest, Prefilling


@dataclass
class EvaluationCost:
    """All evaluations of a training."""

    replies: int = 0
    """Generated."""
    passes: int = 0
    """Passes of single rows, forward and backward ones, that searches for them take: their steps', without
    what tries a start or looks at an end."""
    flops: int = 0
    """Floating-point operations of both."""
    uncounted: list[str] = field(default_factory=list)
    """What else is evaluated."""


def passes_of(attack: Attack | None) -> int | None:
    """Passes, forward and backward ones, of a search's steps for an example; None where unknown."""
    match attack:
        case None | DirectRequest() | Prefilling() | InitialSuffix():
            return 0
        case EmbeddingPGD():
            return 2 * attack.num_steps
        case LatentPGD():
            return 2 * attack.descent.num_steps * (1 if attack.weight_safe == 0 else 2)
        case SoftPrompt():
            return 2 * attack.descent.num_steps
        case GCG():
            return attack.num_steps * (attack.width + 2)
        case AdaptiveGCG():
            return sum(stage.repetitions * (passes_of(stage.search) or 0) for stage in attack.stages)
    return None


def evaluations(
    callbacks: Iterable[Callback], sets: Mapping[str, Collection[Any]], steps: int, forward: Forward
) -> EvaluationCost:
    """Count what a training's evaluations ask.

    Args:
        callbacks: the trainer's.
        sets: the evaluation's sources by subject, of which only those that there are are asked.
        steps: of the training.
        forward: counts a pass.
    """
    cost = EvaluationCost()
    for own in callbacks:
        if not isinstance(own, Evaluation):
            continue
        if steps < 1:
            cost.uncounted.append(f"{own.name} (trainer.max_steps says no number)")
            continue
        times = own.schedule.at_start + sum(own.schedule.due(step, steps) for step in range(1, steps + 1))
        for probe in own.probes() if times else ():
            if probe.block or probe.blocks:
                cost.uncounted.append(f"{own.name}'s named sets")
                continue
            if not sets.get(probe.subject):
                continue
            limits = [limit for limit in (own.schedule.limit, probe.limit) if limit is not None]
            passes = _searched(probe)
            if not limits or passes is None:
                cost.uncounted.append(f"{own.name}{'/' if probe.name else ''}{probe.name}")
                continue
            rows = times * min(limits)
            replies = rows * (1 + (probe.sampling.k if probe.sampling is not None else 0))
            cost.replies += replies
            cost.passes += rows * passes
            cost.flops += replies * forward.reply(own.max_new_tokens) + rows * passes * forward.scored()
        if times and not own.probes():
            cost.uncounted.append(own.name)
    cost.uncounted = list(dict.fromkeys(cost.uncounted))
    return cost


def _searched(probe: Probe) -> int | None:
    """What a benign prompt carries was found on other requests, but for the searches that say so."""
    searches = probe.transfer is None or probe.name.endswith((TOWARDS_REFUSAL, AWAY_FROM_ANSWER))
    return passes_of(probe.attack) if searches else 0


class Forward:
    """Operations of a pass over one row of the model, whose weights hold nothing.

    Args:
        model: as a plan holds it.
        mode: of its tensors.
        vocabulary: the number of its tokens.
        prompt: tokens of a prompt.
        reply: tokens of a target.
    """

    def __init__(self, model: nn.Module, mode: ShapesOnly, vocabulary: int, prompt: int, reply: int) -> None:
        self.model, self.mode, self.vocabulary = model, mode, vocabulary
        self.prompt, self.target = prompt, reply
        self._known: dict[tuple[int, int], int] = {}

    def reply(self, tokens: int) -> int:
        """A reply of so many tokens, with keys and values kept."""
        return self._operations(self.prompt + tokens, tokens)

    def scored(self) -> int:
        """A prompt and its target, one way."""
        return self._operations(self.prompt + self.target, self.target)

    def _operations(self, length: int, read: int) -> int:
        """Of so many tokens, of which the head reads the last ones."""
        if (length, read) not in self._known:
            with ExitStack() as stack, calm(), torch.no_grad():
                stack.enter_context(self.mode)
                counted = stack.enter_context(Counted(self.model, self.vocabulary))
                ids = torch.arange(length)[None] % self.vocabulary
                self.model(input_ids=ids, use_cache=False, logits_to_keep=read)
            self._known[length, read] = counted.flops.total()
        return self._known[length, read]
