"""What occurred on which example: what rates, and the difference of two models, are computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from callbacks.judges.xstest import PARTIAL_REFUSAL
from callbacks.metrics.estimates import Estimate
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT, Metric, Quantity
from callbacks.metrics.outcomes import worst_case
from callbacks.report import against_base, attributions, certificates, directions, divergences, perplexities
from callbacks.report.measured import Measured, Outcome, attacks_of

NO_SHARES = {*perplexities.UNITS, divergences.QUANTITY, directions.QUANTITY, attributions.QUANTITY}
"""Quantities of texts, tokens and layers, whose rows hold no reply and no verdict."""


@dataclass
class Events:
    """What occurred on which example: what rates, and the difference of two models, are computed from."""

    metric: Metric
    judge: str
    outcome: Outcome
    groups: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    settings: str = ""
    """How it was measured; of a worst case, how each of its attacks was."""
    samples: int = 0
    """Sampled replies per example that were asked; 0 for greedy ones."""
    against: str = ""
    """Named set that asks for the same in other words."""
    categories: Mapping[str, str] = field(default_factory=dict)
    """Example -> its category, where the rate is told by category."""


def events(measured: Sequence[Measured]) -> list[Events]:
    """All events in the order in which they are reported: plain replies, attacks, worst cases, judges."""
    plain = [item for item in measured if not item.measurement.attack and not item.measurement.block]
    blocks = [item for item in measured if item.measurement.block and not item.graded]
    attacks = attacks_of(measured)
    benign = [item for item in measured if item.measurement.attack and item not in attacks]
    succeeded = [_deciding(item) for item in attacks]
    not_refused = [_not_refused(item) for item in attacks if item.measurement.refusal]
    return [
        *(_deciding(item, every=True) for item in plain),
        *succeeded,
        *_worst_cases(succeeded, attacks),
        *not_refused,
        *(_worst_cases(not_refused, attacks) if len(not_refused) == len(attacks) else ()),
        *(event for item in attacks if item.measurement.samples for event in _sampled(item)),
        *(_deciding(item, every=True) for item in benign if item.rows),
        *(event for item in blocks for event in _of_set(item)),
        *(_further(item, j) for item in [*plain, *attacks, *benign] for j in item.measurement.judges),
    ]


def _deciding(item: Measured, every: bool = False) -> Events:
    own = item.measurement
    # The one place where a stored name becomes a metric's.
    metric = Metric(cast(Quantity, own.quantity), own.subject, own.attack, block=own.block)
    return _grouped(item, metric, own.judge, item.outcome(own.judge, every))


def _grouped(item: Measured, metric: Metric, judge: str, outcome: Outcome) -> Events:
    """With its rate in every category."""
    groups, settings = item.groups(outcome), item.measurement.settings
    return Events(metric, judge, outcome, groups, settings, categories=item.categories)


def _not_refused(item: Measured) -> Events:
    own = item.measurement
    outcome = item.outcome(own.refusal, negated=True)
    return _grouped(item, Metric("not_refused_rate", own.subject, own.attack), own.refusal, outcome)


def _further(item: Measured, judge: str) -> Events:
    own = item.measurement
    metric = Metric("judged_rate", own.subject, own.attack, judge, own.block)
    return Events(metric, judge, item.outcome(judge), settings=own.settings, categories=item.categories)


def _sampled(item: Measured) -> list[Events]:
    """The first of the sampled replies succeeded; at least one of them did; at least one was not refused."""
    own = item.measurement
    drawn = Measured(own, item.sampled)
    first = Measured(own, {key: rows[:1] for key, rows in item.sampled.items()})
    found = [
        Events(Metric("success_at_1", own.subject, own.attack), own.judge, first.outcome(own.judge)),
        Events(Metric("success_at_k", own.subject, own.attack), own.judge, drawn.outcome(own.judge)),
    ]
    if own.refusal:
        outcome = drawn.outcome(own.refusal, negated=True)
        found.append(Events(Metric("not_refused_at_k", own.subject, own.attack), own.refusal, outcome))
    for event in found:
        event.settings = own.settings
        event.samples = 1 if event.metric.quantity == "success_at_1" else own.samples
    return found


def _of_set(item: Measured) -> list[Events]:
    """What a named set is measured by: what decides, and beside it what is served, or how replies are
    classed; nothing of a text or of single tokens, layers, whose measures are no shares."""
    own = item.measurement
    if own.quantity in NO_SHARES:
        return []
    if own.quantity == certificates.QUANTITY:
        return [_deciding(item)]
    if own.quantity == "change_rate":
        return [
            _grouped(item, Metric(quantity, own.subject, block=own.block), judge, outcome)
            for quantity, judge, outcome in against_base.outcomes(own, item.rows)
        ]
    found = [_deciding(item, every=True)]
    if own.evaluation == "xstest":
        found += [*_partly(item), *(_further(item, judge) for judge in own.judges)]
    else:
        found += _served(item)
    for event in found:
        event.against = own.against
    return found


def _partly(item: Measured) -> list[Events]:
    """Partial refusals, where the judge tells three classes apart and says so by its score."""
    own = item.measurement
    if own.quantity != "full_refusal_rate":
        return []
    outcome = {
        key: all(row.verdicts[own.judge]["score"] == PARTIAL_REFUSAL for row in rows)
        for key, rows in item.rows.items()
    }
    return [_grouped(item, Metric("partial_refusal_rate", own.subject, block=own.block), own.judge, outcome)]


def _served(item: Measured) -> list[Events]:
    """The reply that was asked for, among the prompts of a named set that have one."""
    own, found = item.measurement, []
    asked = Measured(own, {key: rows for key, rows in item.rows.items() if rows[0].expected})
    for judge in own.judges:
        outcome = asked.outcome(judge, every=True)
        if outcome:
            metric = Metric("served_rate", own.subject, block=own.block)
            found.append(Events(metric, judge, outcome, settings=own.settings))
    return found


def _worst_cases(each: Sequence[Events], attacks: Sequence[Measured]) -> list[Events]:
    """It occurred under at least one attack: one that can be typed, where there are others too; and any.

    Args:
        each: what occurred under each attack, one quantity.
        attacks: the attacks, in the same order.
    """
    whole = list(zip(each, attacks, strict=True))
    typed = [(event, item) for event, item in whole if item.typed]
    suites = [(WORST_CASE_TEXT, typed)] if len(typed) < len(whole) else []
    found = []
    for name, suite in [*suites, (WORST_CASE, whole)]:
        members = [event for event, _ in suite]
        if len(members) > 1:
            outcome = worst_case([event.outcome for event in members])
            metric = replace(members[0].metric, attack=name)
            judges = " or ".join(dict.fromkeys(event.judge for event in members))
            settings = " ".join(f"{event.metric.attack}={event.settings}" for event in members)
            groups, categories = suite[0][1].groups(outcome), members[0].categories
            found.append(Events(metric, judges, outcome, groups, settings, categories=categories))
    return found
