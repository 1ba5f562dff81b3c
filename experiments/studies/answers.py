"""What two runs say to a question: their difference, example by example over all of their seeds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from callbacks.metrics.estimates import Z_95, Difference, paired_difference
from callbacks.metrics.hierarchical import (
    UNTOLD,
    Fixed,
    SeedDifference,
    SeedRate,
    paired_rates,
    paired_values,
    seed_difference,
    seed_terms,
    stacked,
    student,
)
from callbacks.metrics.names import Metric
from callbacks.report.load import text_differences
from callbacks.report.measured import Measured
from callbacks.report.results import PerplexityDifference
from experiments.studies.comparison import Compared
from experiments.studies.definition import Claim, Column

LEVEL = 0.05
"""Of a test: p values from here on tell no difference."""


@dataclass(frozen=True)
class Answer:
    """What two runs say to a question, by one column."""

    claim: Claim
    label: str
    first: SeedRate
    second: SeedRate
    difference: SeedDifference
    paired: Difference | None
    """With the exact McNemar p, where both runs have one seed and the same examples."""
    pairs: int
    """Examples (windows, of a perplexity) that both runs have and that were compared one by one; 0 where the
    difference is joined from the two runs' own intervals."""
    measured_alike: bool
    """Whether judge, attack, length of replies and rows were the same, as far as a seed that both have
    tells."""
    is_rate: bool
    single: bool
    """Whether both runs have one seed, and one of them at least is a training: what is said is of these
    trainings, not of others."""

    def says(self, margin: float) -> str:
        """The verdict of the interval; no difference is told where the exact test beside it tells none."""
        found = self.difference.verdict(margin if self.is_rate else 0.0)
        untold = self.paired is not None and self.paired.p_value >= LEVEL
        return UNTOLD if untold and found in ("lower", "higher") else found


def answers(
    rows: Mapping[str, Compared],
    claims: list[Claim],
    columns: Mapping[str, Column],
    untrained: Collection[str] = (),
) -> list[Answer]:
    """The differences that the questions ask for, where both of their runs are there.

    Args:
        rows: what was read.
        claims: the questions.
        columns: the study's.
        untrained: runs that are a model as it is: other seeds would be the same.
    """
    found = []
    for claim in claims:
        if claim.first not in rows or claim.second not in rows:
            continue
        one, other = rows[claim.first], rows[claim.second]
        for label in claim.columns:
            a, b = one.cell(label), other.cell(label)
            if a is None or b is None:
                continue
            metric = columns[label].metric
            fixed = claim.first in untrained, claim.second in untrained
            difference, pairs = _difference(one, other, metric, fixed) or (seed_difference(a, b), 0)
            found.append(
                Answer(
                    claim,
                    label,
                    a,
                    b,
                    difference,
                    _paired(one, other, metric),
                    pairs,
                    measured_alike=_alike(one, other, metric),
                    is_rate=label in one.rates,
                    single=len(one.by_seed) == len(other.by_seed) == 1 and not all(fixed),
                )
            )
    return found


def _difference(
    one: Compared, other: Compared, metric: Metric, fixed: Fixed
) -> tuple[SeedDifference, int] | None:
    """Example by example, and of how many; None where their examples are not the same: what the few shared
    ones say could contradict the values beside it."""
    outcomes = [
        [own[metric].outcome for own in run.by_seed.values() if metric in own] for run in (one, other)
    ]
    if all(outcomes) and _same(outcomes):
        tables = [stacked(own) for own in outcomes]
        return paired_rates(tables[0], tables[1], fixed), tables[0].shape[1]
    if (windows := _by_window(one, other, metric, fixed)) is not None:
        return windows
    losses = [[own[metric] for own in run.losses.values() if metric in own] for run in (one, other)]
    if all(losses) and _same(losses) and losses[0][0]:
        keys = sorted(losses[0][0])
        first, second = (np.array([[own[key] for key in keys] for own in run]) for run in losses)
        return paired_values(first, second, fixed), len(keys)
    return None


def _same(runs: Sequence[Sequence[Mapping[str, object]]]) -> bool:
    return len({frozenset(own) for run in runs for own in run}) == 1


def _paired(one: Compared, other: Compared, metric: Metric) -> Difference | None:
    """None where a run has several seeds, or one has examples that the other has not."""
    if len(one.by_seed) != 1 or len(other.by_seed) != 1:
        return None
    (first,), (second,) = one.by_seed.values(), other.by_seed.values()
    if metric not in first or metric not in second:
        return None
    before, after = first[metric].outcome, second[metric].outcome
    return paired_difference(before, after) if before.keys() == after.keys() else None


def _by_window(
    one: Compared, other: Compared, metric: Metric, fixed: Fixed
) -> tuple[SeedDifference, int] | None:
    """Of a perplexity, where all seeds have scored the same windows: their chance by block bootstrap, of the
    two seeds for which it is widest, beside that of the seeds."""
    pairs = [
        [_of_windows(first, second, metric) for second in other.texts.values()]
        for first in one.texts.values()
    ]
    known = [[own for own in row if own is not None] for row in pairs]
    if not known or [*map(len, known)] != [len(other.texts)] * len(pairs) or not known[0]:
        return None
    n = min(own.n for row in known for own in row)
    if len(known) == len(known[0]) == 1:
        (own,) = known[0]
        return SeedDifference.of(own.difference, own.low, own.high), n
    changes = np.array([[own.difference for own in row] for row in known])
    widest = max(own.high - own.low for row in known for own in row) / 2
    terms = [((widest / Z_95) ** 2, max(1, n - 1)), *seed_terms(changes.mean(1), changes.mean(0), fixed)]
    return student(float(changes.mean()), terms), n


def _of_windows(
    first: Sequence[Measured], second: Sequence[Measured], metric: Metric
) -> PerplexityDifference | None:
    return next((own for own in text_differences(first, second) if own.metric == metric), None)


def _alike(one: Compared, other: Compared, metric: Metric) -> bool:
    """Whether all seeds have one judge; settings hold the attack's seed, and are compared seed by seed. A
    loss is measured as the attack's success is."""
    if metric.quantity == "loss_best":
        metric = replace(metric, quantity="success_rate")
    judges = {own[metric].judge for run in (one, other) for own in run.by_seed.values() if metric in own}
    shared = one.by_seed.keys() & other.by_seed.keys()
    pairs = [(one.by_seed[seed].get(metric), other.by_seed[seed].get(metric)) for seed in shared]
    return len(judges) < 2 and all(
        a.settings == b.settings for a, b in pairs if a is not None and b is not None
    )
