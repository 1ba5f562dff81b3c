"""Repeat a randomised attack and keep each example's best run: restarts of any attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, checked
from lightning_modules.attacks.base import (
    Attack,
    AttackedPrompt,
    derived_rng,
    draw_seed,
    load_attack_state,
    require_texts,
    state_of,
)
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt
from lightning_modules.attacks.verdicts import Verdict, verdicts
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding

T = TypeVar("T")


@checked
class Repeat:
    """Runs an attack several times, each with an rng of its own; per example the lowest best loss wins and
    costs add up.

    Args:
        attack: the attack to repeat; it must use its rng, or every run is the same.
        num_repetitions: number of runs.
        judge: decides before the loss does: an example is done at the first run whose reply the judge
            accepts, and is not attacked again. Null repeats every example and compares losses alone.
        max_new_tokens: longest reply that the judge reads.
    """

    def __init__(
        self,
        attack: Attack,
        num_repetitions: Count = 5,
        judge: Verdict | None = None,
        max_new_tokens: Count = 64,
    ) -> None:
        if isinstance(attack, LatentPGD | SoftPrompt):
            raise ValueError(
                f"Repeat.attack: expected an attack with a random part, got {type(attack).__name__}, whose "
                "runs are all the same; use EmbeddingPGD with random_start, or a suffix search"
            )
        if isinstance(attack, EmbeddingPGD) and not (attack.random_start and attack.keep == "best"):
            raise ValueError(
                "Repeat.attack: expected random_start true and keep 'best', got "
                f"{attack.random_start} and {attack.keep!r}; set both in attack.init_args, otherwise every "
                "run is the same or its best loss is not what it returns"
            )
        self.attack = attack
        self.num_repetitions = num_repetitions
        self.judge = judge
        self.max_new_tokens = max_new_tokens

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. Raises: what the attack raises; ValueError without texts where a judge reads."""
        seed = 0 if rng is None else draw_seed(rng)
        best, accepted = self._run(model, batch, seed, 0)
        waiting = [row for row, success in enumerate(accepted) if not success]
        for repetition in range(1, self.num_repetitions):
            if not waiting:
                break
            found, accepted = self._run(model, batch.select(waiting), seed, repetition)
            lower = _best_loss(found) < _best_loss(best)[waiting]
            # No run of these was accepted before, so an accepted one wins whatever its loss.
            wins = lower | torch.tensor(accepted, device=lower.device)
            best = merged(best, found, waiting, wins)
            waiting = [row for row, success in zip(waiting, accepted, strict=True) if not success]
        return best

    def _run(
        self, model: LanguageModel, batch: AdversarialBatch, seed: int, repetition: int
    ) -> tuple[AttackedPrompt, list[bool]]:
        """One run and what the judge says of each reply; nothing is accepted without a judge."""
        attacked = self.attack(model, batch, derived_rng(seed, repetition))
        if self.judge is None:
            return attacked, [False] * len(batch)
        require_texts(batch)
        replies = model.reply(attacked, Decoding(self.max_new_tokens))
        asked = torch.ones_like(attacked.forward_passes)
        attacked = replace(attacked, queries=asked + (0 if attacked.queries is None else attacked.queries))
        return attacked, verdicts(self.judge, batch.prompts, replies, batch.targets)

    def state_dict(self) -> dict[str, Any]:
        """What the attack keeps between batches."""
        return {"attack": state_of(self.attack)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_attack_state(self.attack, state["attack"])


def merged(
    old: AttackedPrompt, new: AttackedPrompt, rows: Sequence[int], wins: Bool[Tensor, " row"]
) -> AttackedPrompt:
    """The old result with those of the new one that win; costs add up. Prompts may differ in length.

    Args:
        old: the examples.
        new: some of them, attacked again.
        rows: places of the new examples among the old ones.
        wins: which of the new ones replace their old ones.

    Raises: ValueError where directions are removed from the model meanwhile.
    """
    if old.removal is not None or new.removal is not None:
        raise ValueError(
            "Repeat.attack: expected one whose runs can be compared, got one that removes directions from "
            "the model, of whose runs none is the best; use it by itself"
        )
    first, second = _alike(old, new), _alike(new, old)
    index = torch.tensor(rows, device=old.prompt_ids.device)
    source = wins.nonzero().squeeze(1)
    place = index[source]
    winner = dict(zip(place.tolist(), source.tolist(), strict=True))

    def choose(values: Tensor, others: Tensor) -> Tensor:
        return values.index_copy(0, place, others[source].to(values))

    def choose_all(values: tuple[T, ...], others: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(others[winner[i]] if i in winner else value for i, value in enumerate(values))

    def add(values: Tensor, others: Tensor) -> Tensor:
        return values.index_add(0, index, others.to(values))

    return AttackedPrompt(
        prompt_ids=choose(first.prompt_ids, second.prompt_ids),
        prompt_mask=choose(first.prompt_mask, second.prompt_mask),
        delta=None if first.delta is None or second.delta is None else choose(first.delta, second.delta),
        loss_curve=choose(first.loss_curve.T, second.loss_curve.T).T,
        forward_passes=add(first.forward_passes, second.forward_passes),
        backward_passes=add(first.backward_passes, second.backward_passes),
        distance=choose(first.distance, second.distance),
        # A run that had a gradient has shown that the example has one.
        zero_gradient=first.zero_gradient.index_copy(
            0, index, first.zero_gradient[index] & second.zero_gradient
        ),
        layers={layer: choose(delta, second.layers[layer]) for layer, delta in first.layers.items()},
        texts=choose_all(first.texts, second.texts),
        histories=choose_all(first.histories, second.histories),
        forced=choose_all(first.forced, second.forced),
        # Of the model, not of an example: every run of one attack has the same.
        ablated=first.ablated,
        queries=None
        if first.queries is None or second.queries is None
        else add(first.queries, second.queries),
    )


def _alike(attacked: AttackedPrompt, other: AttackedPrompt) -> AttackedPrompt:
    """The result with all that either of the two has: as wide, as long, with zeros for a perturbation that
    only the other one has. Texts stay where both have them: an embedding cannot be typed."""
    size = len(attacked.prompt_ids)
    grown = max(0, other.prompt_ids.shape[1] - attacked.prompt_ids.shape[1])
    missing = max(0, len(other.loss_curve) - len(attacked.loss_curve))

    def left(delta: Tensor) -> Tensor:
        return functional.pad(delta, (0, 0, grown, 0))

    def perturbation(own: Tensor | None, others: Tensor | None) -> Tensor | None:
        if own is not None or others is None:
            return None if own is None else left(own)
        return others.new_zeros(size, attacked.prompt_ids.shape[1] + grown, others.shape[2])

    layers = {
        layer: perturbation(attacked.layers.get(layer), other.layers.get(layer))
        for layer in sorted({*attacked.layers, *other.layers})
    }
    queries = attacked.queries
    if queries is None and other.queries is not None:
        queries = torch.zeros_like(attacked.forward_passes)
    return replace(
        attacked,
        prompt_ids=functional.pad(attacked.prompt_ids, (grown, 0)),
        prompt_mask=functional.pad(attacked.prompt_mask, (grown, 0)),
        delta=perturbation(attacked.delta, other.delta),
        loss_curve=functional.pad(attacked.loss_curve, (0, 0, 0, missing), value=torch.nan),
        layers={layer: delta for layer, delta in layers.items() if delta is not None},
        texts=attacked.texts if other.texts else (),
        histories=attacked.histories or ((),) * (size if other.histories else 0),
        forced=attacked.forced or ((),) * (size if other.forced else 0),
        queries=queries,
    )


def _best_loss(attacked: AttackedPrompt) -> Float[Tensor, " batch"]:
    """Lowest loss of each example's curve, inf where there is none."""
    if len(attacked.loss_curve) == 0:
        return torch.full((len(attacked.prompt_ids),), torch.inf, device=attacked.prompt_ids.device)
    return attacked.best_loss
