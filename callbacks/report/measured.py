"""The rows that one measurement is computed from, and what they say by themselves."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from callbacks.metrics.estimates import Estimate, rate
from callbacks.metrics.outcomes import BUDGETS, BudgetCurve, spent, success_by_budget
from callbacks.report.grades import GRADE, gradings
from callbacks.report.results import AttackFacts
from datamodules.result_lines import Measurement, Row

UNNAMED = "(none)"
"""Category of the examples that have none."""
Outcome = dict[str, bool]
"""Key of an example -> whether the event occurred."""


@dataclass(frozen=True)
class Measured:
    """The rows that one measurement is computed from, by example; an example has a row per repetition."""

    measurement: Measurement
    rows: Mapping[str, Sequence[Row]]
    sampled: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    """Sampled replies of the examples that have all of them, in the order in which they were drawn."""

    @property
    def complete(self) -> bool:
        if self.graded:
            return gradings(self.measurement, self.rows).missing == 0
        counts = {len(self.rows), *([len(self.sampled)] if self.measurement.samples else [])}
        return counts == {self.measurement.n}

    @property
    def graded(self) -> bool:
        """Whether its verdicts are grades, not events."""
        return self.measurement.quantity == GRADE

    @property
    def typed(self) -> bool:
        """Whether a user can type what was sent; a forced reply needs an interface that lets one begin it."""
        return any(row.attacked is not None and not row.prefill for row in self._flat)

    @property
    def _flat(self) -> list[Row]:
        return [row for own in self.rows.values() for row in own]

    def outcome(self, judge: str, every: bool = False, negated: bool = False) -> Outcome:
        """Whether a judge's verdict is true in any repetition (in every one), where it has judged.

        Args:
            negated: ask for a false verdict instead.
        """
        join: Callable[[Iterable[bool]], bool] = all if every else any
        judged = {k: [row for row in own if judge in row.verdicts] for k, own in self.rows.items()}
        return {k: join(row.verdict(judge) != negated for row in own) for k, own in judged.items() if own}

    def values(self, of: Callable[[Sequence[Row]], float | None]) -> list[float]:
        """A number per example, where it has one."""
        found = (of(own) for own in self.rows.values())
        return [value for value in found if value is not None and not math.isnan(value)]

    @cached_property
    def categories(self) -> Mapping[str, str]:
        """Example -> its category."""
        return {key: own[0].category or UNNAMED for key, own in self.rows.items()}

    def groups(self, outcome: Outcome) -> dict[str, dict[str, Estimate]]:
        """The rate within each category, and within each functional category, where there are several."""
        found: dict[str, dict[str, Estimate]] = {}
        for kind in ("category", "functional"):
            members: dict[str, list[bool]] = defaultdict(list)
            for key, event in outcome.items():
                members[getattr(self.rows[key][0], kind) or UNNAMED].append(event)
            if len(members) > 1:
                found[kind] = {name: rate(members[name]) for name in sorted(members)}
        return found

    def facts(self) -> AttackFacts:
        """How the attack went, beside its success."""
        flags: dict[str, int] = defaultdict(int)
        for row in self._flat:
            for sign, raised in row.flags.items():
                flags[sign] += raised
        success = self.outcome(self.measurement.judge)
        budgets: dict[str, BudgetCurve] = {
            unit: success_by_budget(success, {key: spent(own, unit) for key, own in self.rows.items()})
            for unit in BUDGETS
        }
        settings = self.measurement.settings
        return AttackFacts(
            self.measurement.attack, self.typed, settings, mean_curve(self._flat), dict(flags), budgets
        )


def select(measurements: Sequence[Measurement], rows: Iterable[Row], stage: str, step: int) -> list[Measured]:
    """The measurements of one stage and step with their own rows, which every one of its judges has seen."""
    chosen = [item for item in measurements if (item.stage, item.step) == (stage, step)]
    own: dict[tuple[str, str, str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if (row.stage, row.step) == (stage, step):
            own[row.settings, row.model, row.subject, row.attack][row.example].append(row)
    found = []
    for item in chosen:
        asked = [judge for judge in (item.judge, item.refusal, *item.judges) if judge]
        everything = own[item.settings, item.model, item.subject, item.attack]
        judged = {
            key: [row for row in repeated if all(judge in row.verdicts for judge in asked)]
            for key, repeated in everything.items()
        }
        found.append(_parted(item, judged))
    return found


def _parted(item: Measurement, judged: Mapping[str, Sequence[Row]]) -> Measured:
    """Without sampled replies every repetition counts; with them, the greedy one stands apart."""
    if not item.samples:
        return Measured(item, {key: rows for key, rows in judged.items() if rows})
    greedy = {key: [row for row in rows if row.repetition == 0] for key, rows in judged.items()}
    drawn = {
        key: sorted((row for row in rows if row.repetition), key=lambda row: row.repetition)
        for key, rows in judged.items()
    }
    return Measured(
        item,
        {key: rows for key, rows in greedy.items() if rows},
        {key: rows for key, rows in drawn.items() if len(rows) == item.samples},
    )


def attacks_of(measured: Sequence[Measured]) -> list[Measured]:
    """The attacks on harmful requests; what they do to benign prompts is no success of theirs."""
    return [m for m in measured if m.measurement.attack and m.measurement.subject == "harmful"]


def mean_curve(rows: Sequence[Row]) -> list[float]:
    """Mean attacked loss at every iterate, over the examples that were still attacked."""
    length = max((len(row.loss_curve) for row in rows), default=0)
    found = []
    for i in range(length):
        losses = [row.loss_curve[i] for row in rows if i < len(row.loss_curve)]
        known = [loss for loss in losses if loss is not None]
        if known:
            found.append(math.fsum(known) / len(known))
    return found
