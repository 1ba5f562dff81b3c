"""Named sets of prompts, each measured by itself: what a model does with prompts unlike those it was trained
on."""

from __future__ import annotations

from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.judges.base import Judge
from callbacks.judges.exact import ExactMatch, TargetPrefix
from callbacks.judges.keyword import KeywordRefusal
from datamodules.fields import Count, checked


@checked
class BlockEvaluation(Evaluation):
    """Refused and served, in every set of `data.evaluation.blocks`, harmful and harmless prompts apart.

    A harmful request is served where the reply begins with its target, a harmless one where the reply is the
    expected one; harmless prompts without an expected reply cannot be served and are left out of that share.

    Args:
        schedule: when it runs and on how many rows of every set; null takes the defaults.
        max_new_tokens: longest generated reply.
        served: says whether a harmless prompt was served; null asks for the expected reply, word for word.
    """

    name = "blocks"

    def __init__(
        self, schedule: Schedule | None = None, max_new_tokens: Count = 64, served: Judge | None = None
    ) -> None:
        super().__init__(schedule, max_new_tokens)
        self.served = served or ExactMatch()

    def probes(self) -> list[Probe]:
        refusal = KeywordRefusal()
        return [
            Probe("harmful", "refusal_rate", refusal, judges=[TargetPrefix()], blocks=True),
            Probe("harmless", "over_refusal_rate", refusal, judges=[self.served], blocks=True),
        ]
