"""The refusal direction taken away at random while refusals are learned, so that they do not hang on it.

After ReFAT (Yu et al., arXiv 2409.20089: per layer, found anew every few steps, whole examples) and
DeepRefusal (Xie et al., arXiv 2509.15202: one direction, found once, single layers and tokens). The prompts
stay as they are; only harmful rows meet an attack, so that utility rows are read with the direction in place.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, Fraction, Share, checked
from lightning_modules.attacks.base import AttackedPrompt, NoAttack, example_rngs
from lightning_modules.attacks.embedding.refusal_direction import DirectionalAblation
from lightning_modules.models.hidden_states import num_layers
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.passes import PassCounter
from lightning_modules.models.removal import Removal


@checked
class RandomAblation:
    """Takes the refusal direction from random examples, layers and tokens of a batch, replies included.

    Args:
        finder: how the direction is found, on requests of the training data.
        per_layer: each layer loses its own difference of means, at the prompt's last token; false: all layers
            lose the one direction that the finder chooses.
        every: find it anew after so many batches; null keeps the first one for the whole run.
        examples: chance of an example to lose anything.
        layers: chance of each layer, in such an example.
        tokens: chance of each token, in such a layer.
        skipped: share of the layers, from the first on, that lose nothing.
    """

    def __init__(
        self,
        finder: DirectionalAblation,
        per_layer: bool = True,
        every: Count | None = 4,
        examples: Share = 0.5,
        layers: Share = 1.0,
        tokens: Share = 1.0,
        skipped: Fraction = 0.25,
    ) -> None:
        self.finder = finder
        self.per_layer = per_layer
        self.every = every
        self.examples, self.layers, self.tokens = examples, layers, tokens
        self.skipped = skipped
        self._batches = 0
        self._vectors: dict[int, Tensor] = {}

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Draw what each example loses; there is no search, and no loss is reported. Raises: ValueError where
        the finder's sources hold too few requests, or where a layer tells no direction."""
        attacked = NoAttack()(model, batch, rng)
        with PassCounter() as passes:
            if not self._vectors or (self.every is not None and self._batches % self.every == 0):
                self._vectors = self._found(model)
        self._batches += 1
        where = self._drawn(batch, rng)
        losing = {layer: own.to(batch.prompt_ids.device) for layer, own in where.items() if own.any()}
        return replace(
            attacked,
            # What finding the directions has cost, shared by the batch.
            forward_passes=attacked.forward_passes + math.ceil(passes.forward / len(batch)),
            removal=Removal({layer: self._vectors[layer] for layer in losing}, losing),
        )

    def _found(self, model: LanguageModel) -> dict[int, Tensor]:
        """Layer -> the direction that it may lose."""
        count = num_layers(model)
        own = range(int(self.skipped * count), count)
        if not self.per_layer:
            vector = self.finder.direction(model).vector
            return dict.fromkeys(own, vector)
        vectors = self.finder.differences(model)
        if any(not float(vectors[layer].norm()) > 0 for layer in own):
            raise ValueError(
                "RandomAblation.finder: expected harmful and harmless requests that differ after every "
                "layer, got a difference of length 0; give other requests"
            )
        return {layer: vectors[layer] for layer in own}

    def _drawn(self, batch: AdversarialBatch, rng: torch.Generator | None) -> dict[int, Tensor]:
        """Layer -> where each example loses its direction, by the example's own random state."""
        # A begun reply stands in the prompt, and the safe one behind it.
        sizes = [own.prompt + own.harmful + own.safe for own in batch.lengths or batch.counted()]
        where = {layer: torch.zeros(len(batch), max(sizes), dtype=torch.bool) for layer in self._vectors}
        for row, (size, own) in enumerate(zip(sizes, example_rngs(batch, rng), strict=True)):
            if torch.rand((), generator=own).item() >= self.examples:
                continue
            for places in where.values():
                if torch.rand((), generator=own).item() < self.layers:
                    places[row, :size] = torch.rand(size, generator=own) < self.tokens
        return where

    def state_dict(self) -> dict[str, Any]:
        """What the next batch meets: the directions, and when they are due; alike in all processes."""
        return {"batches": self._batches, "vectors": dict(self._vectors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches, self._vectors = state["batches"], dict(state["vectors"])
