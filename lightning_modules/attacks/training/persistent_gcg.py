"""R2D2's inner attack: GCG that goes on, at every visit, from the suffix it last had for the example
(HarmBench, arXiv 2402.04249)."""

from __future__ import annotations

from typing import Any

import torch

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, Probability, checked
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.training.per_rank import exchanged, gathered, own_states
from lightning_modules.models.language_model import LanguageModel


@checked
class PersistentGCG:
    """A pool of (example, suffix) that lives as long as training and is saved with it.

    Processes tell each other what they have found, so that each goes on from whatever any of them had. Where
    the number of processes has changed, all resume with all pools: of two visits to an example the later one
    counts.

    The pool's size is the number of training rows; a smaller pool is a smaller data set (e.g. `limit` of a
    source).

    Args:
        gcg: the search at each visit: a few steps, without an early stop [5 steps, width 512, topk 256].
        reset_fraction: share of the pool that starts anew from the initial suffix at every reset; 0 for none.
        reset_every: visits (optimiser steps, unless data.attack_batch divides them) between two resets.
    """

    def __init__(self, gcg: GCG, reset_fraction: Probability = 0.2, reset_every: Count = 50) -> None:
        self.gcg = gcg
        self.reset_fraction = reset_fraction
        self.reset_every = reset_every
        self._pool: dict[int, tuple[int, list[int]]] = {}
        self._found: dict[int, tuple[int, list[int]]] = {}
        self._visits = 0

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Go on from the pool and put the results back. Raises: as GCG."""
        examples = batch.example_id.tolist()
        if self._visits and self._visits % self.reset_every == 0:
            self._reset(rng)
        suffixes = [self._pool[example][1] if example in self._pool else None for example in examples]
        attacked, found = self.gcg.go_on(model, batch, suffixes, rng)
        self._found = {
            example: (self._visits, list(suffix)) for example, suffix in zip(examples, found, strict=True)
        }
        self._pool |= self._found
        self._visits += 1
        return attacked

    def share(self, model: LanguageModel) -> None:
        """Put what other processes have found into the pool."""
        self._pool |= dict(exchanged([*self._found.items()]))
        self._found = {}

    def _reset(self, rng: torch.Generator | None) -> None:
        """Forget each suffix with the given chance, drawn for each example alone."""
        seed = int(torch.randint(0, 2**62, (1,), generator=rng).item()) if rng is not None else self._visits
        for example in list(self._pool):
            own = torch.Generator().manual_seed((seed ^ example) & (2**63 - 1))
            if torch.rand((), generator=own).item() < self.reset_fraction:
                del self._pool[example]

    def state_dict(self) -> dict[str, Any]:
        """The pools of all processes."""
        pool = {example: [visit, list(suffix)] for example, (visit, suffix) in self._pool.items()}
        return gathered({"pool": pool, "visits": self._visits})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError for a state without pools."""
        own = own_states(state, self)
        self._pool = {}
        for example, (visit, suffix) in (item for state in own for item in state["pool"].items()):
            entry = visit, list(suffix)
            self._pool[example] = max(self._pool.get(example, entry), entry)
        self._visits = max(state["visits"] for state in own)
