"""What an evaluation measures, said as data: replies to one subject's prompts, under one attack or none, and
who judges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from callbacks.evaluations.sampling import Sampling
from callbacks.judges.base import Judge
from callbacks.metrics.names import Quantity
from datamodules.evaluation import Subject
from lightning_modules.attacks.base import Attack
from lightning_modules.attacks.transfer import Transfer


@dataclass(frozen=True)
class Probe:
    """One measurement of an evaluation."""

    subject: Subject
    quantity: Quantity
    """What the deciding judge's verdict is called."""
    judge: Judge
    """Decides."""
    name: str = ""
    """The attack's name in its suite; '' without one."""
    attack: Attack | None = None
    refusal: Judge | None = None
    """Says beside it whether the reply refuses."""
    judges: Sequence[Judge] = ()
    """Further judges, stored and reported beside it."""
    limit: int | None = None
    """Fewer rows than the evaluation's own limit, inside `fit`."""
    test_limit: int | None = None
    """The same for `validate` and `test`."""
    transfer: Transfer | None = None
    """How the attack is done to benign prompts; null attacks the prompts themselves. It uses what the
    attack's own probe, which stands before this one, has found."""
    sampling: Sampling | None = None
    """Sampled replies beside the greedy one."""
    blocks: bool = False
    """Measure every named set of the subject (data.evaluation.blocks) instead of the main one."""
    block: str = ""
    """The named set in force."""
    against: str = ""
    """The named set that asks for the same things in other words, under the same keys."""

    @property
    def asked(self) -> list[Judge]:
        """Every judge whose verdict is wanted."""
        return [self.judge, *([self.refusal] if self.refusal else []), *self.judges]
