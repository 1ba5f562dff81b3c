"""Finished runs side by side: from their rows to rates over seeds, and to differences between two of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np

from callbacks.metrics.estimates import Z_95, Difference, Estimate, paired_difference
from callbacks.metrics.hierarchical import (
    UNTOLD,
    Fixed,
    SeedDifference,
    SeedRate,
    paired_rates,
    paired_values,
    seed_difference,
    seed_rate,
    seed_terms,
    stacked,
    student,
)
from callbacks.metrics.names import Metric
from callbacks.report.events import Events, events
from callbacks.report.load import text_differences
from callbacks.report.measured import Measured, attacks_of, select
from callbacks.report.perplexities import UNITS
from callbacks.report.results import Measure, PerplexityDifference
from callbacks.report.snapshots import lowest_losses, snapshot
from callbacks.report.under_attack import under_attack
from callbacks.run_folder.folder import RunFolder
from datamodules.results import last_step, read_measurements, read_rows
from experiments.studies.definition import Claim, Column

LEVEL = 0.05
"""Of a test: p values from here on tell no difference."""
Happened = dict[Metric, Events]
"""Metric -> what occurred on every test example, by whom it was judged and how it was measured."""


@dataclass(frozen=True)
class Compared:
    """One run of a study, all of its seeds together."""

    rates: dict[str, SeedRate]
    """Column -> rate over seeds and examples. A column without one (an optional one) is missing."""
    means: dict[str, SeedRate]
    """Column -> mean over the seeds of what is no rate (a perplexity, passes of an attack); the interval
    reaches over all of the seeds' own."""
    passes: float
    """Forward and backward passes of single examples in training, the reference's and those of collecting
    the data included; mean over seeds."""
    by_seed: dict[int, Happened] = field(default_factory=dict, repr=False)
    """What occurred on every example: two runs are compared example by example."""
    carrying: dict[str, int] = field(default_factory=dict)
    """Attack -> seeds whose model refuses or fails benign prompts that carry it (report/under_attack.py)."""
    texts: dict[int, list[Measured]] = field(default_factory=dict, repr=False)
    """Scored windows by seed: two runs are compared window by window."""
    losses: dict[int, dict[Metric, dict[str, float]]] = field(default_factory=dict, repr=False)
    """Lowest loss of every attack by seed and example, compared likewise."""

    def cell(self, label: str) -> SeedRate | None:
        return self.rates.get(label, self.means.get(label))


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


def tested(folder: Path) -> tuple[int, list[Measured]]:
    """The step of a run's last test, and its rows. Raises: ValueError where not all of it was tested."""
    step = last_step(folder, "test")
    if step is None:
        raise ValueError(f"{folder}: no results of `test`; run the study again")
    measured = select(read_measurements(folder), read_rows(folder), "test", step)
    for own in measured:
        if not own.graded and not own.complete:  # a grade may be missing, a reply may not
            what, n = own.measurement, own.measurement.n
            name = " under ".join(part for part in (what.subject, what.attack) if part)
            raise ValueError(
                f"{folder}: {len(own.rows)} of {n} replies of {name}; test it again, or bring it back"
            )
    return step, measured


def read(runs: Mapping[str, Mapping[int, Path]], columns: Mapping[str, Column]) -> dict[str, Compared]:
    """Results of finished runs by name.

    Args:
        runs: name -> seed -> run folder.
        columns: what is read of them.

    Raises: ValueError where a run lacks a column.
    """
    found = {}
    for name, folders in runs.items():
        told = {seed: tested(folder) for seed, folder in folders.items()}
        by_seed = {seed: {e.metric: e for e in events(own)} for seed, (_, own) in told.items()}
        carrying = Counter(
            attack
            for _, own in told.values()
            for attack, sign in under_attack(own).items()
            if sign.refuses_what_carries_it
        )
        rates, means = {}, {}
        measures: list[Mapping[Metric, Measure]] = []
        for label, column in columns.items():
            metric = column.metric
            missing = [folders[seed] for seed, own in by_seed.items() if metric not in own]
            if not missing:
                rates[label] = _rate(name, label, [own[metric] for own in by_seed.values()])
                continue
            measures = measures or [snapshot(own, "test", step).measures for step, own in told.values()]
            estimates = [_mean(own.get(metric)) for own in measures]
            known = [own for own in estimates if own is not None]
            if len(known) == len(estimates):
                means[label] = _over_seeds(known)
            elif not column.optional:
                raise ValueError(
                    f"{missing[0]}: no {label!r} ({metric.key}) among its results of `test`; test it again "
                    "with the evaluation that measures it, or make the column optional"
                )
        texts = {
            seed: [item for item in own if item.measurement.quantity in UNITS]
            for seed, (_, own) in told.items()
        }
        losses = {seed: _losses(own, columns) for seed, (_, own) in told.items()}
        spent = passes(folders.values())
        found[name] = Compared(rates, means, spent, by_seed, dict(carrying), texts, losses)
    return found


def _losses(measured: Sequence[Measured], columns: Mapping[str, Column]) -> dict[Metric, dict[str, float]]:
    """Of the attacks whose lowest loss is a column, by example."""
    wanted = {own.metric for own in columns.values() if own.quantity == "loss_best"}
    of = {Metric("loss_best", "harmful", own.measurement.attack): own for own in attacks_of(measured)}
    return {metric: lowest_losses(own) for metric, own in of.items() if metric in wanted}


def _rate(name: str, label: str, by_seed: Sequence[Events]) -> SeedRate:
    judges = {own.judge for own in by_seed}
    if len(judges) > 1:
        raise ValueError(
            f"{name}: {label!r} was judged by {' and '.join(sorted(judges))}; test all of its seeds again "
            "with one of them"
        )
    if len({frozenset(own.outcome) for own in by_seed}) > 1:
        counts = ", ".join(str(len(own.outcome)) for own in by_seed)
        raise ValueError(
            f"{name}: {label!r} was judged on other examples in some of its seeds ({counts}); test all of "
            "them again on the same"
        )
    return seed_rate(stacked([own.outcome for own in by_seed]))


def _mean(measure: Measure | None) -> Estimate | None:
    return None if measure is None or measure.estimate.kind == "rate" else measure.estimate


def _over_seeds(own: list[Estimate]) -> SeedRate:
    values = tuple(estimate.value for estimate in own)
    lows, highs = [e.low for e in own], [e.high for e in own]
    return SeedRate(fmean(values), min(lows), max(highs), values, min(e.n for e in own))


def passes(folders: Iterable[Path]) -> float:
    """Forward and backward passes of training, the mean over runs; 0 where none has counted them."""
    paths = [RunFolder.of(folder).cost for folder in folders]
    costs = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    return fmean(cost["passes"] + cost.get("collecting_passes", 0) for cost in costs) if costs else 0.0


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
            alike = _alike(one, other, metric)
            paired = _paired(one, other, metric)
            is_rate, single = (
                label in one.rates,
                len(one.by_seed) == len(other.by_seed) == 1 and not all(fixed),
            )
            found.append(Answer(claim, label, a, b, difference, paired, pairs, alike, is_rate, single))
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
    """Whether all seeds have one judge; settings hold the attack's seed, and are compared seed by seed."""
    judges = {own[metric].judge for run in (one, other) for own in run.by_seed.values() if metric in own}
    shared = one.by_seed.keys() & other.by_seed.keys()
    pairs = [(one.by_seed[seed].get(metric), other.by_seed[seed].get(metric)) for seed in shared]
    return len(judges) < 2 and all(
        a.settings == b.settings for a, b in pairs if a is not None and b is not None
    )
