"""Finished runs side by side: from their rows to rates over seeds, and to differences between two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from callbacks.metrics.estimates import Estimate, paired_difference
from callbacks.metrics.hierarchical import SeedDifference, SeedRate, seed_difference, seed_rate, stacked
from callbacks.metrics.names import Metric
from callbacks.report.events import events
from callbacks.report.load import load
from callbacks.report.measured import select
from callbacks.run_folder.folder import RunFolder
from datamodules.results import last_step, read_measurements, read_rows
from experiments.studies.definition import Claim, Column

Outcomes = dict[Metric, dict[str, bool]]
"""Metric -> key of a test example -> whether it occurred."""


@dataclass(frozen=True)
class Compared:
    """One run of a study, all of its seeds together."""

    rates: dict[str, SeedRate]
    """Column -> rate over seeds and examples. A column without one (an optional one) is missing."""
    means: dict[str, SeedRate]
    """Column -> mean over the seeds of what is no rate (a perplexity, passes of an attack); the interval
    reaches over all of the seeds' own."""
    passes: float
    """Forward and backward passes of single examples in training, the reference's included; mean over
    seeds."""
    one_seed: Outcomes = field(default_factory=dict, repr=False)
    """What occurred on every example, of a run with one seed: two such are compared pair by pair."""

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
    p_value: float | None
    """Exact McNemar of the same examples, where both runs have one seed."""
    is_rate: bool


def outcomes(folder: Path) -> Outcomes:
    """What occurred on every test example of a run. Raises: ValueError where nothing was tested."""
    step = last_step(folder, "test")
    if step is None:
        raise ValueError(f"{folder}: no results of `test`; run the study again")
    measured = select(read_measurements(folder), read_rows(folder), "test", step)
    return {event.metric: event.outcome for event in events(measured)}


def read(
    runs: Mapping[str, Mapping[int, Path]],
    columns: Mapping[str, Column],
    optional: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Compared]:
    """Results of finished runs by name.

    Args:
        runs: name -> seed -> run folder.
        columns: what is read of them.
        optional: further columns that a run may lack, by its name.

    Raises: ValueError where a run lacks a column.
    """
    found = {}
    for name, folders in runs.items():
        by_seed = {folder: outcomes(folder) for folder in folders.values()}
        rates, means = {}, {}
        for label, column in columns.items():
            metric = column.metric
            missing = [folder for folder, own in by_seed.items() if metric not in own]
            if not missing:
                rates[label] = seed_rate(stacked([own[metric] for own in by_seed.values()]))
                continue
            estimates = [_mean(folder, metric) for folder in by_seed]
            known = [own for own in estimates if own is not None]
            if len(known) == len(estimates):
                means[label] = _over_seeds(known)
            elif not (column.optional or label in (optional or {}).get(name, ())):
                raise ValueError(
                    f"{missing[0]}: no {label!r} ({metric.key}) among its results of `test`; test it again "
                    "with the evaluation that measures it, or make the column optional"
                )
        only = next(iter(by_seed.values())) if len(by_seed) == 1 else {}
        found[name] = Compared(rates, means, _passes(folders.values()), only)
    return found


def _mean(folder: Path, metric: Metric) -> Estimate | None:
    after = load(folder, "test").after
    measure = None if after is None else after.measures.get(metric)
    return None if measure is None or measure.estimate.kind != "mean" else measure.estimate


def _over_seeds(own: list[Estimate]) -> SeedRate:
    values = tuple(estimate.value for estimate in own)
    lows, highs = [e.low for e in own], [e.high for e in own]
    return SeedRate(fmean(values), min(lows), max(highs), values, min(e.n for e in own))


def _passes(folders: object) -> float:
    paths = [RunFolder.of(folder).cost for folder in folders]  # type: ignore[attr-defined]
    costs = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    return fmean(cost["passes"] for cost in costs) if costs else 0.0


def answers(rows: Mapping[str, Compared], claims: list[Claim], columns: Mapping[str, Column]) -> list[Answer]:
    """The differences that the questions ask for, where both of their runs are there."""
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
            paired = (
                paired_difference(one.one_seed[metric], other.one_seed[metric])
                if metric in one.one_seed and metric in other.one_seed
                else None
            )
            joined = seed_difference(a, b)
            if paired is not None:
                joined = SeedDifference(paired.difference, paired.low, paired.high, joined.detectable)
            found.append(
                Answer(claim, label, a, b, joined, paired.p_value if paired else None, label in one.rates)
            )
    return found
