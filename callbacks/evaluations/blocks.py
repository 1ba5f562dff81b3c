"""Named sets of prompts, each measured by itself: what a model does with prompts unlike those it was trained
on."""

from __future__ import annotations

from dataclasses import replace

from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.judges.base import Judge
from callbacks.judges.exact import ExactMatch, TargetPrefix
from callbacks.judges.keyword import KeywordRefusal
from datamodules.fields import Count, checked


@checked
class BlockEvaluation(Evaluation):
    """Refused and served, in the sets of `data.evaluation.blocks`, harmful and harmless prompts apart.

    A harmful request is served where the reply begins with its target, a harmless one where the reply is the
    expected one; harmless prompts without an expected reply cannot be served and are left out of that share.

    Args:
        schedule: when it runs and on how many rows of every set; null takes the defaults.
        max_new_tokens: longest generated reply.
        served: says whether a harmless prompt was served; null asks for the expected reply, word for word.
        sets: names of the sets; null takes all, also those that another evaluation brought for itself.
    """

    name = "blocks"

    def __init__(
        self,
        schedule: Schedule | None = None,
        max_new_tokens: Count = 64,
        served: Judge | None = None,
        sets: list[str] | None = None,
    ) -> None:
        super().__init__(schedule, max_new_tokens)
        if sets is not None and not sets:
            raise ValueError("BlockEvaluation.sets: expected at least one name, got none; null takes all")
        self.served = served or ExactMatch()
        self.sets = sets

    def probes(self) -> list[Probe]:
        refusal = KeywordRefusal()
        every = [
            Probe("harmful", "refusal_rate", refusal, judges=[TargetPrefix()], blocks=True),
            Probe("harmless", "over_refusal_rate", refusal, judges=[self.served], blocks=True),
        ]
        if self.sets is None:
            return every
        return [replace(probe, block=name, blocks=False) for name in self.sets for probe in every]
