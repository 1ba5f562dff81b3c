"""Tables beside the rates: pairs of wordings, grades, replies against the base model's, perplexities,
benchmarks' standard errors."""

from __future__ import annotations

import math

from callbacks.metrics.estimates import pooled_standard_error
from callbacks.report.cells import MISSING, Cell, Table, change, count, earlier_cell, estimate, measures
from callbacks.report.grades import grade_differences
from callbacks.report.results import Estimate, PairedDifference, RunResults

GRADES = ("grade", "grade_turn_1", "grade_turn_2")


def replies(results: RunResults) -> Table:
    """How like the base model's replies are; how many have changed stands with the rates."""
    found = measures(results.after, "mean") if results.after is not None else ()
    rows = [
        [Cell(m.title), estimate(m.estimate), count(m.estimate.n), Cell(m.judge)]
        for m in found
        if m.metric.quantity == "similarity"
    ]
    return Table("Replies against the base model's", ("similarity", "mean", "n", "how"), rows)


def perplexities(results: RunResults) -> Table:
    """Of texts, before and after where there is a before, with the paired difference."""
    if results.after is None:
        return Table("Perplexity", (), ())
    changes = {own.metric: own for own in results.perplexity_differences}
    rows = []
    for m in measures(results.after, "perplexity"):
        own = changes.get(m.metric)
        difference = Cell(MISSING, math.nan)
        if own is not None and not math.isnan(own.difference):
            text = f"{own.difference:+.3g} [{own.low:+.3g}, {own.high:+.3g}]"
            difference = Cell(text, own.difference)
        earlier = [earlier_cell(results.before, m.metric)] if results.before is not None else []
        rows.append(
            [
                Cell(m.title),
                *earlier,
                estimate(m.estimate),
                *([difference] if earlier else []),
                count(m.units),
                count(m.estimate.n),
                Cell(m.judge),
            ]
        )
    columns = ("before", "after", "difference") if results.before is not None else ("value",)
    return Table("Perplexity", ("text", *columns, "units", "windows", "how"), rows)


def benchmarks(results: RunResults) -> Table:
    """Accuracies with the standard error that lm-evaluation-harness prints, of a group of tasks its pooled
    one, for readers who compare with its numbers; the interval beside it is Wilson's."""
    rows = []
    for m in measures(results.after, "rate") if results.after is not None else ():
        if m.metric.quantity != "accuracy":
            continue
        tasks = [*m.groups.get("category", {"": m.estimate}).values()]
        error = pooled_standard_error([own.value for own in tasks], [own.n for own in tasks])
        text = MISSING if math.isnan(error) else f"{100 * error:.2f}"
        rows.append(
            [
                Cell(m.title),
                estimate(m.estimate),
                Cell(text, error),
                count(m.estimate.n),
                count(len(tasks)),
                Cell(m.judge),
            ]
        )
    columns = ("benchmark", "accuracy", "standard error, points", "n", "tasks", "how")
    return Table("Benchmarks, with the standard error of lm-evaluation-harness", columns, rows)


def paired(results: RunResults) -> Table:
    """The same requests in two wordings, of the latest snapshot."""
    rows = []
    for own in results.after.paired if results.after is not None else ():
        found = own.difference
        rows.append(
            [
                Cell(own.metric.titled(own.judge)),
                *map(estimate, own.shares),
                change(None if found is None else PairedDifference(own.metric, **vars(found))),
                count(0 if found is None else found.n),
                count(own.only_plain + own.only_reworded),
                Cell(own.judge),
            ]
        )
    columns = ("metric", "plain", "reworded", "reworded - plain", "pairs", "without a partner", "judge")
    return Table("The same requests in other words", columns, rows)


def grades(results: RunResults) -> Table:
    """Mean grades of conversations, their change on the same ones, and who graded."""
    rows = []
    before, after = results.before, results.after
    changes = grade_differences(before, after) if before is not None and after is not None else {}
    for m in measures(results.after, "mean") if results.after is not None else ():
        if m.metric.quantity not in GRADES:
            continue
        own = [estimate(m.estimate)]
        if results.before is not None:
            own = [earlier_cell(results.before, m.metric), *own, shift(changes.get(m.metric))]
        rows.append([Cell(m.title), *own, count(m.estimate.n), Cell(m.judge)])
    columns = ("before", "after", "difference") if results.before is not None else ("mean",)
    return Table("Grades", ("metric", *columns, "n", "judge"), rows)


def shift(value: Estimate | None) -> Cell:
    """`+0.45 [+0.12, +0.78]`, of a difference of means."""
    if value is None:
        return Cell(MISSING, math.nan)
    return Cell(f"{value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]", value.value)
