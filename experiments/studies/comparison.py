"""Finished runs side by side: from their rows to rates over seeds, and to differences between two of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from callbacks.metrics.estimates import Estimate
from callbacks.metrics.hierarchical import (
    SeedRate,
    seed_rate,
    stacked,
)
from callbacks.metrics.names import Metric
from callbacks.report import certificates, directions
from callbacks.report.events import Events, events
from callbacks.report.measured import Measured, attacks_of, select
from callbacks.report.perplexities import UNITS
from callbacks.report.results import Certified, DirectionAt, Measure
from callbacks.report.snapshots import lowest_losses, snapshot
from callbacks.report.under_attack import under_attack
from callbacks.run_folder.folder import RunFolder
from datamodules.results import last_step, read_measurements, read_rows
from experiments.studies.definition import Column

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
    certified: list[list[Certified]] = field(default_factory=list, repr=False)
    """What is guaranteed, by subject; a seed each."""
    directions: list[list[DirectionAt]] = field(default_factory=list, repr=False)
    """The refusal direction against the one before training, by layer, their mean at the end; a seed each."""

    def cell(self, label: str) -> SeedRate | None:
        return self.rates.get(label, self.means.get(label))


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
        by_seed = {seed: _happened(own, columns) for seed, (_, own) in told.items()}
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
        guaranteed = [certificates.of_measured(own) for _, own in told.values()]
        moved = [directions.of_measured(own) for _, own in told.values()]
        beside = dict(carrying), texts, losses, guaranteed, moved
        found[name] = Compared(rates, means, spent, by_seed, *beside)
    return found


def _happened(measured: Sequence[Measured], columns: Mapping[str, Column]) -> Happened:
    """With certificates beyond the radii that columns ask for."""
    found = {event.metric: event for event in events(measured)}
    certifying = {
        item.measurement.subject: item
        for item in measured
        if item.measurement.quantity == certificates.QUANTITY
    }
    for metric in (column.metric for column in columns.values() if column.beyond):
        at_all = found.get(replace(metric, beyond=0.0))
        if at_all is not None:
            outcome = certificates.beyond(certifying[metric.subject], metric.beyond)
            found[metric] = replace(at_all, metric=metric, outcome=outcome, groups={})
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
