"""How the model holds against a suite of attacks: success per attack, worst case per example, cost, and
whether to trust it."""

from __future__ import annotations

from callbacks.evaluations.base import Evaluation
from callbacks.evaluations.benign import AWAY_FROM_ANSWER, TOWARDS_REFUSAL, BenignUnderAttack
from callbacks.evaluations.probe import Probe
from callbacks.evaluations.sampling import Sampling
from callbacks.evaluations.schedule import Schedule
from callbacks.judges.base import Judge
from callbacks.judges.exact import TargetPrefix
from callbacks.judges.keyword import KeywordRefusal
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT
from datamodules.fields import Count, NonNegativeInt, checked
from lightning_modules.attacks.base import Attack
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.initial_suffix import InitialSuffix
from lightning_modules.attacks.text.rewrites import DirectRequest


@checked
class RobustnessEvaluation(Evaluation):
    """Attacks held-out harmful behaviours with every attack of a suite, generates from what they found and
    judges the replies.

    Put DirectRequest (the un-attacked request) into every suite: a success rate says nothing without it.

    Args:
        attacks: attacks by name; the name is part of the metric.
        success: judge whose verdict is the success of an attack; null takes the harmful target's prefix.
        judges: further judges, stored and reported beside it.
        schedule: when it runs and on how many rows; null takes the defaults.
        attack_limits: fewer rows for single attacks (by name) inside `fit`; worst cases then count the rows
            that all attacks tried.
        benign: what every attack does is also done to benign prompts; null measures harmful requests alone.
        sampling: sampled replies to what each attack found, beside the greedy ones; null samples none.
        max_new_tokens: longest generated reply.
        seed: seed of the attacks; null takes the run's.
    """

    name = "robustness"

    def __init__(
        self,
        attacks: dict[str, Attack],
        success: Judge | None = None,
        judges: list[Judge] | None = None,
        schedule: Schedule | None = None,
        attack_limits: dict[str, Count] | None = None,
        benign: BenignUnderAttack | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: Count = 64,
        seed: NonNegativeInt | None = None,
    ) -> None:
        super().__init__(schedule, max_new_tokens, seed or 0)
        if not attacks:
            raise ValueError(f"{type(self).__name__}.attacks: expected at least one named attack, got none")
        taken = {"", WORST_CASE, WORST_CASE_TEXT} & set(attacks)
        if taken:
            raise ValueError(
                f"{type(self).__name__}.attacks: {sorted(taken)[0]!r} is no name for an attack; rename it"
            )
        for end in (TOWARDS_REFUSAL, AWAY_FROM_ANSWER):
            searched = next((name for name in attacks if name.endswith(end)), None)
            if searched is not None:
                raise ValueError(
                    f"{type(self).__name__}.attacks: {searched!r} is the name of a search on benign prompts; "
                    f"rename it so that it does not end in {end!r}"
                )
        unknown = set(attack_limits or {}) - set(attacks)
        if unknown:
            raise ValueError(
                f"{type(self).__name__}.attack_limits: expected names among {sorted(attacks)}, got "
                f"{sorted(unknown)}"
            )
        if benign is not None:
            benign.check(attacks)
        self.attacks = attacks
        self.success: Judge = success or TargetPrefix()
        self.judges = judges or []
        self.attack_limits = attack_limits or {}
        self.benign = benign
        self.sampling = sampling

    def probes(self) -> list[Probe]:
        refusal = KeywordRefusal()
        harmful = [
            Probe(
                "harmful",
                "success_rate",
                self.success,
                name,
                attack,
                refusal,
                self.judges,
                self.attack_limits.get(name),
                sampling=self.sampling,
            )
            for name, attack in self.attacks.items()
        ]
        benign = self.benign.probes(self.attacks, refusal) if self.benign is not None else ()
        return [*harmful, *benign]


@checked
class GCGEvaluation(RobustnessEvaluation):
    """GCG with a stated budget, and beside it the request itself and the un-optimised suffix.

    Args:
        gcg: the attack; null takes its defaults.
        schedule: when it runs and on how many rows; null takes the defaults.
        max_new_tokens: longest generated reply.
        seed: seed of the attack; null takes the run's.
    """

    name = "gcg"

    def __init__(
        self,
        gcg: GCG | None = None,
        schedule: Schedule | None = None,
        max_new_tokens: Count = 64,
        seed: NonNegativeInt | None = None,
    ) -> None:
        gcg = gcg or GCG()
        attacks: dict[str, Attack] = {
            "direct": DirectRequest(),
            "initial_suffix": InitialSuffix(gcg.num_tokens, gcg.init, gcg.place),
            "gcg": gcg,
        }
        super().__init__(attacks, schedule=schedule, max_new_tokens=max_new_tokens, seed=seed)
