"""Grades of two-turn conversations from rows: means by turn and category, and what could not be graded.

An example is a conversation, its turns are its rows (repetition 0 and 1). A verdict without a score is a
grading that nobody could read; a row without a verdict is one that the judge could not be asked about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from callbacks.metrics.estimates import mean, mean_difference
from callbacks.metrics.names import Metric, Quantity
from callbacks.report.results import Estimate, Gradings, Measure, Snapshot
from datamodules.result_lines import Measurement, Row

GRADE = "grade"
"""Quantity of a measurement whose verdicts are grades."""
TURNS: tuple[Quantity, ...] = ("grade_turn_1", "grade_turn_2")


def grades(own: Measurement, rows: Mapping[str, Sequence[Row]]) -> dict[Metric, Measure]:
    """Mean grade of the conversations of which both turns have one, and of every turn.

    Intervals are over conversations: two turns of one are no two independent grades.

    Args:
        rows: by conversation, those that a judge has seen.
    """
    by_turn = [
        {key: score for key, turns in rows.items() if (score := _score(own, turns, turn)) is not None}
        for turn in range(len(TURNS))
    ]
    both = {
        key: sum(scores[key] for scores in by_turn) / len(TURNS)
        for key in rows
        if all(key in scores for scores in by_turn)
    }
    found = {}
    for quantity, scores in zip((GRADE, *TURNS), (both, *by_turn), strict=True):
        if scores:
            metric = Metric(quantity, own.subject, block=own.block)  # type: ignore[arg-type]
            groups = _by_category(rows, scores)
            found[metric] = Measure(
                metric, mean([*scores.values()]), own.judge, groups, own.settings, values=scores
            )
    return found


def grade_differences(before: Snapshot, after: Snapshot) -> dict[Metric, Estimate]:
    """after - before of every mean grade, over the conversations that both have one of, by the same judge and
    of replies that were asked for in the same way."""
    found = {}
    for metric, now in after.measures.items():
        then = before.measures.get(metric)
        if then is None or (then.judge, then.settings) != (now.judge, now.settings):
            continue
        difference = mean_difference(then.values, now.values)
        if difference is not None:
            found[metric] = difference
    return found


def gradings(own: Measurement, rows: Mapping[str, Sequence[Row]]) -> Gradings:
    """How many gradings there should be, and how many are missing or cannot be read."""
    seen = [row for turns in rows.values() for row in turns]
    asked = own.n * len(TURNS)
    return Gradings(
        judge=own.judge,
        asked=asked,
        missing=asked - len(seen),
        unreadable=sum(row.verdicts[own.judge]["score"] is None for row in seen),
        cut=sum(row.flags.get("cut", False) for row in seen),
        beyond_window=sum(row.flags.get("beyond_window", False) for row in seen),
    )


def _score(own: Measurement, turns: Sequence[Row], turn: int) -> float | None:
    row = next((row for row in turns if row.repetition == turn), None)
    score = None if row is None else row.verdicts[own.judge]["score"]
    return None if score is None else float(score)


def _by_category(
    rows: Mapping[str, Sequence[Row]], scores: Mapping[str, float]
) -> dict[str, dict[str, Estimate]]:
    members: dict[str, list[float]] = defaultdict(list)
    for key, score in scores.items():
        members[rows[key][0].category or "(none)"].append(score)
    if len(members) < 2:
        return {}
    return {"category": {name: mean(members[name]) for name in sorted(members)}}
