"""The same harmful behaviours in two wordings, e.g. HarmBench's commands and polite questions: what a defence
has learned of the form instead of the matter."""

from __future__ import annotations

from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.judges.base import Judge
from callbacks.judges.exact import TargetPrefix
from callbacks.judges.keyword import KeywordRefusal
from datamodules.fields import Count, checked


@checked
class WordingEvaluation(Evaluation):
    """Refused and served in two named sets whose harmful rows have the same keys, and the paired difference
    of the two; a row without a partner is counted and said.

    Args:
        plain: name of the one set in `data.evaluation.blocks`.
        reworded: name of the other; differences are reworded - plain.
        schedule: when it runs and on how many rows of each set; null takes the defaults.
        max_new_tokens: longest generated reply.
        served: says whether a request was served; null asks for the beginning of its target.
    """

    name = "wordings"

    def __init__(
        self,
        plain: str,
        reworded: str,
        schedule: Schedule | None = None,
        max_new_tokens: Count = 64,
        served: Judge | None = None,
    ) -> None:
        super().__init__(schedule, max_new_tokens)
        if plain == reworded:
            raise ValueError(f"WordingEvaluation.reworded: expected another set than {plain!r}, got the same")
        self.plain = plain
        self.reworded = reworded
        self.served = served or TargetPrefix()

    def probes(self) -> list[Probe]:
        refusal = KeywordRefusal()
        return [
            Probe("harmful", "refusal_rate", refusal, judges=[self.served], block=self.plain),
            Probe(
                "harmful",
                "refusal_rate",
                refusal,
                judges=[self.served],
                block=self.reworded,
                against=self.plain,
            ),
        ]
