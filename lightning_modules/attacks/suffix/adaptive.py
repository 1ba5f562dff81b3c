"""One attack made of many: searches of several lengths, placements, targets and losses in stages, until the
evaluation would count a success.

A fixed search asks whether a model withstands that search; a defence that was tuned against it passes. Here
an example meets one search after the other, and every stage may start from what already worked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import AdversarialBatch
from datamodules.fields import Count, NonNegativeInt, checked
from lightning_modules.attacks.base import AttackedPrompt, derived_rng, draw_seed, require_texts
from lightning_modules.attacks.repeat import merged
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.stored import StoredSuffixes
from lightning_modules.attacks.suffix.targets import OtherTargets, says_target
from lightning_modules.attacks.verdicts import Verdict, verdicts
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding

Start = Literal["initial", "last", "found"]


@checked
@dataclass
class Stage:
    """One search of an AdaptiveGCG."""

    search: GCG
    """Its length, placement, target and loss; num_steps x width is its budget."""
    start: Start = "initial"
    """initial: from the initial suffix, with random draws of its own. last: go on from where the example's
    last stage of this length and placement stopped. found: from the likeliest of the suffixes that worked
    before, for other examples or in `warm_start`."""
    target: NonNegativeInt = 0
    """0 aims at the example's own target, 1 at the first of its `targets`, and so on, in turn."""
    repetitions: Count = 1
    """How often it runs, each time with other random draws."""


@checked
class AdaptiveGCG:
    """GCG in stages; an example leaves once its greedy reply says the target, or the judge is content.

    The row's passes are those of all its stages, so success against budget reads off the rows. Of stages that
    all failed, the one under which the counted part of the target is likeliest stays.

    Args:
        stages: what is tried, in this order.
        judge: decides instead of the target's first sentence whether an example is done; each stage costs a
            reply then. Stages still stop at the target: give the judge's stages `stop_at_target: false` where
            it asks for more.
        targets: further targets of the requests, for stages that name one; needs a judge, since a reply to
            another target is none to the example's own.
        share: suffixes that worked for one example are starts for the others (`start: found`); an example's
            result then depends on its batch-mates.
        warm_start: suffixes of an earlier run as starts; null for none.
        max_starts: suffixes tried as starts of a stage, the latest first; each costs a forward pass.
        max_new_tokens: longest reply that the judge reads.
    """

    def __init__(
        self,
        stages: list[Stage],
        judge: Verdict | None = None,
        targets: OtherTargets | None = None,
        share: bool = True,
        warm_start: StoredSuffixes | None = None,
        max_starts: Count = 16,
        max_new_tokens: Count = 64,
    ) -> None:
        if not stages:
            raise ValueError("AdaptiveGCG.stages: expected at least one stage, got none")
        if any(stage.target for stage in stages) and (targets is None or judge is None):
            raise ValueError(
                "AdaptiveGCG.stages: expected targets and a judge for a stage with a target of its own; set "
                "`targets` and `judge`"
            )
        self.stages = stages
        self.targets = targets
        self.judge = judge
        self.share = share
        self.warm_start = warm_start
        self.max_starts = max_starts
        self.max_new_tokens = max_new_tokens

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        """Attack the batch. Raises: as GCG; ValueError where `warm_start` holds nothing."""
        require_texts(batch)
        seed = 0 if rng is None else draw_seed(rng)
        memory = _Memory([] if self.warm_start is None else self.warm_start.ids(model.chat))
        waiting, best, lowest = list(range(len(batch))), None, torch.full((len(batch),), torch.inf)
        turns = [stage for stage in self.stages for _ in range(stage.repetitions)]
        for number, stage in enumerate(turns):
            own = batch.select(waiting)
            aimed = self.targets(model, own, stage.target) if self.targets and stage.target else own
            draws = derived_rng(seed, number)
            found, suffixes = self._search(model, aimed, stage, memory, waiting, draws)
            accepted, losses, found = self._judged(model, own, found)
            # Losses of different targets and lengths are not comparable; those of what counts are.
            wins = torch.tensor(accepted) | (losses < lowest[waiting])
            lowest[waiting] = torch.minimum(lowest[waiting], losses)
            best = found if best is None else merged(best, found, waiting, wins)
            for row, suffix, success in zip(waiting, suffixes, accepted, strict=True):
                memory.keep(row, stage.search, suffix, success and self.share)
            waiting = [row for row, success in zip(waiting, accepted, strict=True) if not success]
            if not waiting:
                break
        assert best is not None
        return best

    def _search(
        self,
        model: LanguageModel,
        batch: AdversarialBatch,
        stage: Stage,
        memory: _Memory,
        rows: Sequence[int],
        rng: torch.Generator,
    ) -> tuple[AttackedPrompt, list[list[int]]]:
        """One stage on the examples that are left."""
        search = stage.search
        if stage.start == "last":
            return search.go_on(model, batch, [memory.last(row, search) for row in rows], rng)
        pool = memory.starts(search.num_tokens, self.max_starts)
        if stage.start == "initial" or not pool:
            return search.go_on(model, batch, [None] * len(batch), rng)
        starts, passes = search.likeliest(model, batch, pool)
        found, suffixes = search.go_on(model, batch, starts, rng)
        return replace(found, forward_passes=found.forward_passes + passes), suffixes

    def _judged(
        self, model: LanguageModel, batch: AdversarialBatch, found: AttackedPrompt
    ) -> tuple[list[bool], Float[Tensor, " batch"], AttackedPrompt]:
        """Which examples are done, losses of what counts of their targets, and the result with what that
        cost."""
        said, losses = says_target(model, batch, found)
        found = replace(found, forward_passes=found.forward_passes + 1)
        if self.judge is None:
            return said, losses, found
        replies = model.reply(found, Decoding(self.max_new_tokens))
        asked = torch.ones_like(found.forward_passes)
        found = replace(found, queries=asked + (0 if found.queries is None else found.queries))
        return verdicts(self.judge, batch.prompts, replies, batch.targets), losses, found


class _Memory:
    """Suffixes of earlier stages.

    Args:
        worked: those that made a model say a target.
    """

    def __init__(self, worked: list[list[int]]) -> None:
        self._worked = worked
        self._stopped: dict[tuple[int, int, str], list[int]] = {}

    def keep(self, row: int, search: GCG, suffix: list[int], worked: bool) -> None:
        """Where an example's search stopped, and whether others may start from it."""
        self._stopped[row, search.num_tokens, search.place] = list(suffix)
        if worked:
            self._worked.append(list(suffix))

    def last(self, row: int, search: GCG) -> list[int] | None:
        """Where the example's last search of this length and placement stopped; None where there was none."""
        return self._stopped.get((row, search.num_tokens, search.place))

    def starts(self, num_tokens: int, limit: int) -> list[list[int]]:
        """What worked, the latest first, repeated or cut to a length."""
        fitted = (tuple((suffix * num_tokens)[:num_tokens]) for suffix in reversed(self._worked) if suffix)
        return [list(suffix) for suffix in dict.fromkeys(fitted)][:limit]
