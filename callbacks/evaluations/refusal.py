"""Does the model refuse what it should, and only that: refusals of harmful and of harmless prompts."""

from __future__ import annotations

from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.judges.keyword import KeywordRefusal
from datamodules.fields import Count, checked


@checked
class RefusalEvaluation(Evaluation):
    """Counts refusals of harmful and of harmless prompts (no attack) with the keyword judge.

    Args:
        schedule: when it runs and on how many rows; null takes the defaults.
        max_new_tokens: longest generated reply.
    """

    name = "refusal"

    def __init__(self, schedule: Schedule | None = None, max_new_tokens: Count = 64) -> None:
        super().__init__(schedule, max_new_tokens)

    def probes(self) -> list[Probe]:
        judge = KeywordRefusal()
        return [
            Probe("harmful", "refusal_rate", judge),
            Probe("harmless", "over_refusal_rate", judge),
        ]
