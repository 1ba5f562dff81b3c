"""The measures of one model at one step, with n, intervals, groups and warning signs, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from callbacks.metrics.estimates import mean, rate
from callbacks.metrics.names import Metric, Quantity
from callbacks.metrics.outcomes import cross_flags, spent
from callbacks.report import against_base, attributions, certificates, directions, divergences, perplexities
from callbacks.report.defended import costs
from callbacks.report.events import NO_SHARES, events
from callbacks.report.grades import grades, gradings
from callbacks.report.measured import Measured, attacks_of
from callbacks.report.results import Measure, SampleRow, Snapshot, Stage
from callbacks.report.under_attack import under_attack
from callbacks.report.wordings import paired_sets
from datamodules.result_lines import Row

UNREAD = {*NO_SHARES, certificates.QUANTITY}
"""Quantities whose rows hold no reply to be read."""


def snapshot(measured: Sequence[Measured], stage: Stage, step: int) -> Snapshot:
    """The model at one step; `measured` must hold something."""
    attacks = {item.measurement.attack: item for item in attacks_of(measured)}
    happened = events(measured)
    measures = {
        e.metric: Measure(
            e.metric, rate([*e.outcome.values()]), e.judge, e.groups, e.settings, samples=e.samples
        )
        for e in happened
    }
    graded = [item for item in measured if item.graded]
    for item in graded:
        measures |= grades(item.measurement, item.rows)
    for item in measured:
        measures |= _means(item, attacks)
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
        samples=[
            _sample(row)
            for item in measured
            if item.measurement.quantity not in UNREAD
            for own in item.rows.values()
            for row in own
        ],
        benign=under_attack(measured),
        paired=paired_sets(happened),
        certified=certificates.of_measured(measured),
        costs=costs(measured),
        divergences=[
            estimate
            for item in measured
            if item.measurement.quantity == divergences.QUANTITY
            for estimate in divergences.by_position(item.measurement, item.rows)
        ],
        directions=directions.of_measured(measured),
        attributions=[
            attribution
            for item in measured
            if item.measurement.quantity == attributions.QUANTITY
            for attribution in attributions.attributions(item.rows)
        ],
        gradings={item.measurement.block: gradings(item.measurement, item.rows) for item in graded},
        complete=all(item.complete for item in measured),
    )


def _means(item: Measured, attacks: Mapping[str, Measured]) -> dict[Metric, Measure]:
    """What a measurement says beside shares: of an attack, of a text, of replies against the base model's."""
    own = item.measurement
    if attacks.get(own.attack) is item:
        return _efforts(item)
    if own.quantity in perplexities.UNITS:
        return perplexities.of_text(own, item.rows)
    if own.quantity == divergences.QUANTITY:
        return divergences.overall(own, item.rows)
    if own.quantity == directions.QUANTITY:
        return directions.overall(own, item.rows)
    if own.quantity == attributions.QUANTITY:
        return attributions.overall(own, item.rows)
    if own.quantity == "change_rate":
        metric = Metric("similarity", own.subject, block=own.block)
        similarity = mean(against_base.similarities(own, item.rows))
        return {metric: Measure(metric, similarity, own.judge, settings=own.settings)}
    return {}


def _efforts(item: Measured) -> dict[Metric, Measure]:
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


def lowest_losses(item: Measured) -> dict[str, float]:
    """By example, in nats per token, of an attack's best repetition; of those that have a loss."""
    found = {key: _losses(own)[1] for key, own in item.rows.items()}
    return {key: loss for key, loss in found.items() if loss is not None}


def _losses(own: Sequence[Row]) -> tuple[float | None, float | None]:
    """First and lowest attacked loss of the repetition that came lowest."""
    curves = [[loss for loss in row.loss_curve if loss is not None] for row in own]
    best = min((curve for curve in curves if curve), key=min, default=None)
    return (best[0], min(best)) if best else (None, None)


def _sample(row: Row) -> SampleRow:
    return SampleRow(
        subject=row.subject,
        attack=row.attack,
        key=row.example,
        category=row.category,
        prompt=row.prompt,
        attacked=row.attacked if row.attacked not in (row.prompt, row.document) else None,
        history=[(user, assistant) for user, assistant in row.history],
        prefill=row.prefill,
        expected=row.expected,
        reply=row.reply,
        verdicts={judge: row.verdict(judge) for judge in row.verdicts},
        base_reply=row.base_reply,
        document=row.document,
        answer=row.answer,
    )
