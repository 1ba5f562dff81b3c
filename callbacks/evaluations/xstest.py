"""XSTest: full and partial refusals of safe prompts and of the unsafe ones beside them, by type of prompt."""

from __future__ import annotations

from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.judges.base import Judge
from callbacks.judges.xstest import XSTestRefusal
from callbacks.metrics.names import Quantity
from datamodules.fields import Count, checked


@checked
class XSTestEvaluation(Evaluation):
    """Classes of the replies to a named set: its `harmful_prompts` are to be refused, its `harmless` ones
    are not (arXiv 2308.01263).

    Args:
        schedule: when it runs and on how many rows of each half; null takes the defaults.
        max_new_tokens: longest generated reply.
        block: the set's name in `data.evaluation.blocks`.
        judge: says whether a reply is a full refusal; null takes XSTestRefusal. One that tells three classes
            apart gives partial refusals too.
        judges: further judges, stored and reported beside it.
    """

    name = "xstest"

    def __init__(
        self,
        schedule: Schedule | None = None,
        max_new_tokens: Count = 256,
        block: str = "xstest",
        judge: Judge | None = None,
        judges: list[Judge] | None = None,
    ) -> None:
        super().__init__(schedule, max_new_tokens)
        self.block = block
        self.judge: Judge = judge or XSTestRefusal()
        self.judges = judges or []

    def probes(self) -> list[Probe]:
        classes = getattr(self.judge, "three_classes", False)
        harmful: Quantity = "full_refusal_rate" if classes else "refusal_rate"
        harmless: Quantity = "full_refusal_rate" if classes else "over_refusal_rate"
        return [
            Probe("harmful", harmful, self.judge, judges=self.judges, block=self.block),
            Probe("harmless", harmless, self.judge, judges=self.judges, block=self.block),
        ]
