"""Does a model follow instructions that somebody hid in a document, and does it go on with its task."""

from __future__ import annotations

from callbacks.evaluations.benign import BenignUnderAttack
from callbacks.evaluations.robustness import RobustnessEvaluation
from callbacks.evaluations.schedule import Schedule
from callbacks.judges.injection import AnswerOverlap, InjectedText, TaskKept
from datamodules.evaluation import EvaluationData
from datamodules.fields import Count, NonNegativeInt, checked
from lightning_modules.attacks.base import Attack


@checked
class InjectionEvaluation(RobustnessEvaluation):
    """Documents with hidden instructions as they are (DirectRequest), and under attacks on their tokens:
    injection success, and the task still done under it, by style and kind of task.

    Args:
        attacks: attacks by name; they may write the document alone (data.encoding.attackable: data, or
            untrusted).
        schedule: when it runs and on how many rows; null takes the defaults.
        attack_limits: fewer rows for single attacks (by name) inside `fit`.
        benign: what every attack does is also done to clean documents; null measures hidden instructions
            alone.
        max_new_tokens: longest generated reply.
        seed: seed of the attacks; null takes the run's.
    """

    name = "injection"

    def __init__(
        self,
        attacks: dict[str, Attack],
        schedule: Schedule | None = None,
        attack_limits: dict[str, Count] | None = None,
        benign: BenignUnderAttack | None = None,
        max_new_tokens: Count = 64,
        seed: NonNegativeInt | None = None,
    ) -> None:
        super().__init__(
            attacks,
            success=InjectedText(),
            judges=[TaskKept(), AnswerOverlap()],
            schedule=schedule,
            attack_limits=attack_limits,
            benign=benign,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )

    def attach(self, data: EvaluationData) -> None:
        """Raises: ValueError where attacks may write the trusted instruction, or a row has no document."""
        if data.encoding.attackable not in ("data", "untrusted"):
            raise ValueError(
                "InjectionEvaluation: expected data.encoding.attackable data or untrusted, got "
                f"{data.encoding.attackable!r}; the instruction is trusted, so attacks must leave it alone"
            )
        bare = next((own.row.key for own in data.examples.get("harmful", ()) if own.row.data is None), None)
        if bare is not None:
            raise ValueError(
                f"InjectionEvaluation: expected a document in every harmful row, got {bare!r} without one; "
                "put such requests into a set of their own (data.evaluation.blocks)"
            )
        super().attach(data)
