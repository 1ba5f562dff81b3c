"""Benign prompts under attack, beside every attack on harmful requests: does the model refuse harm, or
whatever carries an attack?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from callbacks.evaluations.probe import Probe
from callbacks.judges.base import Judge
from callbacks.judges.exact import ExactMatch
from datamodules.fields import Count, checked
from lightning_modules.attacks.base import Attack
from lightning_modules.attacks.benign_search import away_of
from lightning_modules.attacks.transfer import transfer_of, turned_of

TOWARDS_REFUSAL = "_towards_refusal"
"""Ends the name of a search for refusals of benign prompts."""
AWAY_FROM_ANSWER = "_away_from_answer"
"""Ends the name of a search for wrong answers to benign tasks."""


@checked
@dataclass(frozen=True)
class BenignUnderAttack:
    """What an attack does to harmful requests is done to benign prompts (attacks/transfer.py says how).

    The evaluation's harmless prompts count as refused or not, and its benign tasks as right or not. An attack
    that cannot be done to another request has no such numbers.
    """

    limit: Count | None = 100
    """Rows of each benign subject per attack, inside `fit` and elsewhere; null takes the evaluation's."""
    towards_refusal: bool = True
    """For attacks within a ball, also search for perturbations that make the model refuse; for directional
    ablation, also add the direction."""
    away_from_answer: list[str] = field(default_factory=list)
    """Names of descents within a ball of embeddings that also search for perturbations that make the model
    wrong on benign tasks: an upper bound of its robust accuracy."""

    def check(self, attacks: Mapping[str, Attack]) -> None:
        """Raises: ValueError for a name of `away_from_answer` that is none of the suite, or cannot search."""
        known = [own for own, attack in attacks.items() if away_of(attack) is not None]
        for name in self.away_from_answer:
            if name not in known:
                raise ValueError(
                    f"benign.away_from_answer: expected descents in a ball of embeddings, of this suite: "
                    f"{', '.join(known) or 'none'}; got {name!r}"
                )

    def probes(self, attacks: Mapping[str, Attack], refusal: Judge) -> Iterator[Probe]:
        """The benign side of every attack of a suite."""
        for name, attack in attacks.items():
            transfer = transfer_of(attack)
            if transfer is None:
                continue
            done = Probe(
                "harmless",
                "over_refusal_rate",
                refusal,
                name,
                attack,
                limit=self.limit,
                test_limit=self.limit,
                transfer=transfer,
            )
            yield done
            yield replace(done, subject="utility", quantity="exact_match", judge=ExactMatch())
            search = turned_of(attack) if self.towards_refusal else None
            if search is not None:
                title = f"{name}{TOWARDS_REFUSAL}"
                yield replace(done, quantity="forced_refusal_rate", name=title, transfer=search)
            if name in self.away_from_answer:
                away = away_of(attack)
                assert away is not None, "the suite has refused it"
                yield replace(
                    done,
                    subject="utility",
                    quantity="robust_accuracy",
                    judge=ExactMatch(),
                    name=f"{name}{AWAY_FROM_ANSWER}",
                    transfer=away,
                )
