"""From rows to what they say: the measures of one model, with n, intervals, groups and warning signs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from callbacks.metrics.estimates import Estimate, mean, rate
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT, Metric, Quantity
from callbacks.metrics.outcomes import BUDGETS, BudgetCurve, cross_flags, spent, success_by_budget, worst_case
from callbacks.report.results import AttackFacts, Measure, SampleRow, Snapshot, Stage
from datamodules.results import Measurement, Row

Outcome = dict[str, bool]
"""Key of an example -> whether the event occurred."""


@dataclass(frozen=True)
class Measured:
    """The rows that one measurement is computed from, by example; an example has a row per repetition."""

    measurement: Measurement
    rows: Mapping[str, Sequence[Row]]

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.measurement.n

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

    def groups(self, outcome: Outcome) -> dict[str, dict[str, Estimate]]:
        """The rate within each category, and within each functional category, where there are several."""
        found: dict[str, dict[str, Estimate]] = {}
        for kind in ("category", "functional"):
            members: dict[str, list[bool]] = defaultdict(list)
            for key, event in outcome.items():
                members[getattr(self.rows[key][0], kind) or "(none)"].append(event)
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


@dataclass
class Events:
    """What occurred on which example: what rates, and the difference of two models, are computed from."""

    metric: Metric
    judge: str
    outcome: Outcome
    groups: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    settings: str = ""
    """How it was measured; of a worst case, how each of its attacks was."""


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
        found.append(Measured(item, {key: repeated for key, repeated in judged.items() if repeated}))
    return found


def events(measured: Sequence[Measured]) -> list[Events]:
    """All events in the order in which they are reported: plain replies, attacks, worst cases, judges."""
    plain = [item for item in measured if not item.measurement.attack]
    attacks = [item for item in measured if item.measurement.attack]
    return [
        *(_deciding(item, every=True) for item in plain),
        *(_deciding(item) for item in attacks),
        *_worst_cases(attacks),
        *(_not_refused(item) for item in attacks if item.measurement.refusal),
        *(_further(item, judge) for item in measured for judge in item.measurement.judges),
    ]


def snapshot(measured: Sequence[Measured], stage: Stage, step: int) -> Snapshot:
    """The model at one step; `measured` must hold something."""
    attacks = {item.measurement.attack: item for item in measured if item.measurement.attack}
    measures = {
        e.metric: Measure(e.metric, rate([*e.outcome.values()]), e.judge, e.groups, e.settings)
        for e in events(measured)
    }
    for item in attacks.values():
        measures |= _means(item)
    success = {name: item.outcome(item.measurement.judge) for name, item in attacks.items()}
    with_gradients = {
        name for name, item in attacks.items() if item.values(lambda own: own[0].backward_passes or None)
    }
    return Snapshot(
        stage=stage,
        step=step,
        model=measured[-1].measurement.model,
        measures=measures,
        attacks={name: item.facts() for name, item in attacks.items()},
        cross_flags=cross_flags(success, with_gradients),
        samples=[_sample(row) for item in measured for own in item.rows.values() for row in own],
        complete=all(item.complete for item in measured),
    )


def _deciding(item: Measured, every: bool = False) -> Events:
    own = item.measurement
    # The one place where a stored name becomes a metric's.
    metric = Metric(cast(Quantity, own.quantity), own.subject, own.attack)
    outcome = item.outcome(own.judge, every)
    return Events(metric, own.judge, outcome, item.groups(outcome), own.settings)


def _not_refused(item: Measured) -> Events:
    own = item.measurement
    outcome = item.outcome(own.refusal, negated=True)
    metric = Metric("not_refused_rate", own.subject, own.attack)
    return Events(metric, own.refusal, outcome, item.groups(outcome), own.settings)


def _further(item: Measured, judge: str) -> Events:
    own = item.measurement
    metric = Metric("judged_rate", own.subject, own.attack, judge)
    return Events(metric, judge, item.outcome(judge), settings=own.settings)


def _worst_cases(attacks: Sequence[Measured]) -> list[Events]:
    """At least one attack succeeded: one that can be typed, where there are others too; and any."""
    typed = [item for item in attacks if item.typed]
    suites = [(WORST_CASE_TEXT, typed)] if len(typed) < len(attacks) else []
    found = []
    for name, members in [*suites, (WORST_CASE, list(attacks))]:
        if len(members) > 1:
            outcome = worst_case([item.outcome(item.measurement.judge) for item in members])
            metric = Metric("success_rate", members[0].measurement.subject, name)
            judges = " or ".join(dict.fromkeys(item.measurement.judge for item in members))
            settings = " ".join(f"{m.measurement.attack}={m.measurement.settings}" for m in members)
            found.append(Events(metric, judges, outcome, members[0].groups(outcome), settings))
    return found


def _means(item: Measured) -> dict[Metric, Measure]:
    """Losses of the best repetition and costs of all of them, per example; none where nothing was counted."""
    of: dict[Quantity, Callable[[Sequence[Row]], float | None]] = {
        "loss_start": lambda own: _losses(own)[0],
        "loss_best": lambda own: _losses(own)[1],
        "passes_per_example": lambda own: spent(own, "passes"),
        "queries_per_example": lambda own: spent(own, "queries"),
        "seconds_per_example": lambda own: spent(own, "seconds"),
    }
    found = {}
    for quantity, function in of.items():
        values = item.values(function)
        metric = Metric(quantity, item.measurement.subject, item.measurement.attack)
        if values:
            found[metric] = Measure(metric, mean(values), settings=item.measurement.settings)
    return found


def _losses(own: Sequence[Row]) -> tuple[float | None, float | None]:
    """First and lowest attacked loss of the repetition that came lowest."""
    curves = [[loss for loss in row.loss_curve if loss is not None] for row in own]
    best = min((curve for curve in curves if curve), key=min, default=None)
    return (best[0], min(best)) if best else (None, None)


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


def _sample(row: Row) -> SampleRow:
    return SampleRow(
        subject=row.subject,
        attack=row.attack,
        key=row.example,
        category=row.category,
        prompt=row.prompt,
        attacked=row.attacked if row.attacked != row.prompt else None,
        history=[(user, assistant) for user, assistant in row.history],
        prefill=row.prefill,
        expected=row.expected,
        reply=row.reply,
        verdicts={judge: row.verdict(judge) for judge in row.verdicts},
    )
