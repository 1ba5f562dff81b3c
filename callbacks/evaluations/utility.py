"""Is the model still useful: exact match on benign tasks with one right reply, also by category."""

from __future__ import annotations

from collections.abc import Sequence

from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.judges.base import Judge
from callbacks.judges.exact import ExactMatch
from datamodules.fields import Count, checked


@checked
class UtilityEvaluation(Evaluation):
    """Compares replies to benign tasks with the expected ones.

    Args:
        schedule: when it runs and on how many rows; null takes the defaults.
        max_new_tokens: longest generated reply.
        judges: further judges of the same replies, such as AnswerOverlap where a right answer may be put in
            other words.
    """

    name = "utility"

    def __init__(
        self,
        schedule: Schedule | None = None,
        max_new_tokens: Count = 64,
        judges: Sequence[Judge] = (),
    ) -> None:
        super().__init__(schedule, max_new_tokens)
        self.judges = judges

    def probes(self) -> list[Probe]:
        return [Probe("utility", "exact_match", ExactMatch(), judges=self.judges)]
