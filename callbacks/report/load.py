"""RunResults of a run folder, computed from its rows, and their export as results.json.

results.json (schema 3) is an output for other programs, never read here: stage, steps, `before` and `after`
(snapshots, null where there is none), `history` (all snapshots), `differences` (after - before on the same
examples) and cost. A snapshot lists its measures by `Metric.key`, each with value, low, high, n, kind and
judge, and says whether every evaluation behind it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from callbacks.metrics.estimates import paired_difference
from callbacks.metrics.names import Metric
from callbacks.report import perplexities
from callbacks.report.events import Events, events
from callbacks.report.grades import grade_differences
from callbacks.report.measured import Measured, select
from callbacks.report.results import (
    Difference,
    Estimate,
    Measure,
    PairedDifference,
    PairedSets,
    PerplexityDifference,
    RunResults,
    Snapshot,
    Stage,
)
from callbacks.report.snapshots import snapshot
from callbacks.report.training_log import read_training_log
from callbacks.run_folder.folder import RunFolder
from datamodules.result_lines import Measurement
from datamodules.results import ROWS, last_step, read_measurements, read_rows

EXPORT_SCHEMA = 3


def load(folder: str | Path, stage: Stage = "fit", defence: str = "") -> RunResults:
    """All that one stage of a run has measured, of the model itself or behind one defence: never of both.

    Raises: see `load_measured`.
    """
    return load_measured(folder, stage, defence)[0]


def load_measured(
    folder: str | Path, stage: Stage = "fit", defence: str = ""
) -> tuple[RunResults, dict[int, list[Measured]]]:
    """The same, and by step the rows that it was computed from, for what compares several runs.

    Raises: FileNotFoundError where the stage has measured nothing; ValueError naming file and line of a line
        that is no result, or the file that is damaged.
    """
    folder = Path(folder)
    measurements = read_measurements(folder, defence)
    last = last_step(folder, stage, defence)
    # Who tests an earlier checkpoint again wants to see that one.
    steps = sorted({m.step for m in measurements if m.stage == stage}, key=lambda step: (step == last, step))
    if not steps:
        raise FileNotFoundError(
            f"{folder / ROWS}: no results of `{stage}`; run `thundercat {stage}` with evaluation callbacks "
            "first"
        )
    rows = read_rows(folder)
    measured = {step: select(measurements, rows, stage, step) for step in steps}
    training = stage == "fit"
    snapshots, set_aside = comparable([snapshot(own, stage, step) for step, own in measured.items()])
    began = training or _began([*read_measurements(folder), *measurements], stage)
    compared = 0 in steps and steps[-1] > 0 and began
    results = RunResults(
        folder=folder,
        stage=stage,
        snapshots=snapshots,
        set_aside=set_aside,
        compared=compared,
        differences=rate_differences(events(measured[0]), events(measured[steps[-1]])) if compared else [],
        perplexity_differences=text_differences(measured[0], measured[steps[-1]]) if compared else [],
        cost=_read(RunFolder.of(folder).cost) if training else {},
        training=[
            {name: float(value) for name, value in row.items() if value} for row in read_training_log(folder)
        ]
        if training
        else [],
        configuration=_read(RunFolder.of(folder).config(stage, defence)),
        environment=_read(RunFolder.of(folder).environment(stage, defence)),
        defence=defence,
    )
    return results, measured


def _began(measurements: Sequence[Measurement], stage: Stage) -> bool:
    """Whether what a stage measured at step 0 are the weights that this run's training began from, as `fit`
    saw them: nothing else keeps another base model from being tested in the same folder."""
    began = {m.model for m in measurements if m.stage == "fit" and m.step == 0}
    return bool(began) and {m.model for m in measurements if m.stage == stage and m.step == 0} <= began


def comparable(snapshots: Sequence[Snapshot]) -> tuple[list[Snapshot], list[str]]:
    """The snapshots without what the last one measured in another way, and the titles of the rates
    among it.

    An attack with another budget or radius, another length of replies, other rows or another judge, as a
    resumed run may have: its number says nothing about the change of the model.
    """
    *earlier, last = snapshots
    found: list[Snapshot] = []
    away: set[Metric] = set()
    for own in earlier:
        other = {
            metric
            for metric, now in last.measures.items()
            if (then := own.measures.get(metric)) is not None
            and (then.judge, then.settings) != (now.judge, now.settings)
        }
        away |= other
        pairs = {(metric.subject, metric.attack) for metric in other}
        found.append(
            replace(
                own,
                measures={metric: m for metric, m in own.measures.items() if metric not in other},
                attacks={
                    name: facts
                    for name, facts in own.attacks.items()
                    if name not in last.attacks or facts.settings == last.attacks[name].settings
                },
                samples=[s for s in own.samples if (s.subject, s.attack) not in pairs],
                directions=[] if any(m.quantity == "direction" for m in other) else own.directions,
            )
        )
    titles = [own.title for m, own in last.measures.items() if m in away and own.estimate.kind != "mean"]
    return [*found, last], titles


def rate_differences(before: Sequence[Events], after: Sequence[Events]) -> list[PairedDifference]:
    """What is a rate in both, measured in the same way by the same judge, on the examples that both have."""
    earlier = {(e.metric, e.judge, e.settings): e.outcome for e in before}
    found = []
    for event in after:
        outcome = earlier.get((event.metric, event.judge, event.settings))
        difference = paired_difference(outcome, event.outcome) if outcome is not None else None
        if difference is not None:
            found.append(PairedDifference(event.metric, **vars(difference)))
    return found


def text_differences(before: Sequence[Measured], after: Sequence[Measured]) -> list[PerplexityDifference]:
    """The same of the texts whose windows were scored in both, in the same way."""
    earlier = {
        (item.measurement.block, item.measurement.judge, item.measurement.settings): item
        for item in before
        if item.measurement.quantity in perplexities.UNITS
    }
    found = []
    for item in after:
        own = item.measurement
        then = earlier.get((own.block, own.judge, own.settings))
        if then is not None:
            found += perplexities.differences(own, then.rows, item.rows)
    return found


def export(results: RunResults) -> dict[str, Any]:
    """What results.json holds."""
    differences: list[PairedDifference | PerplexityDifference] = [*results.differences]
    differences += results.perplexity_differences
    return {
        "schema": EXPORT_SCHEMA,
        "stage": results.stage,
        **({"defence": results.defence} if results.defence else {}),
        "steps": [own.step for own in results.snapshots],
        "before": _exported(results.before),
        "after": _exported(results.after),
        "history": [_exported(own) for own in results.snapshots],
        "differences": {
            own.metric.key: {key: value for key, value in asdict(own).items() if key != "metric"}
            for own in differences
        },
        **_present(
            "grade_differences",
            {metric.key: asdict(own) for metric, own in _grade_differences(results).items()},
        ),
        "cost": dict(results.cost),
    }


def _grade_differences(results: RunResults) -> dict[Metric, Estimate]:
    before, after = results.before, results.after
    return grade_differences(before, after) if before is not None and after is not None else {}


def _exported(own: Snapshot | None) -> dict[str, Any] | None:
    if own is None:
        return None
    return {
        "step": own.step,
        "model": own.model,
        "complete": own.complete,
        "measures": {metric.key: _measure(measure) for metric, measure in own.measures.items()},
        "attacks": {name: asdict(facts) for name, facts in own.attacks.items()},
        "cross_flags": dict(own.cross_flags),
        "benign": {name: asdict(facts) for name, facts in own.benign.items()},
        **_present("paired", {pair.metric.key: _paired(pair) for pair in own.paired}),
        **_present("gradings", {name: asdict(facts) for name, facts in own.gradings.items()}),
    }


def _present(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A field of what not every run measures: none where there is nothing."""
    return {name: found} if found else {}


def _paired(pair: PairedSets) -> dict[str, Any]:
    return {
        "against": pair.plain.key,
        "judge": pair.judge,
        **(_compared(pair, pair.difference) if pair.difference is not None else {"n": 0}),
        "only_plain": pair.only_plain,
        "only_reworded": pair.only_reworded,
    }


def _compared(pair: PairedSets, difference: Difference) -> dict[str, Any]:
    plain, reworded = (asdict(own) for own in pair.shares)
    return {**asdict(difference), "plain": plain, "reworded": reworded}


def _measure(measure: Measure) -> dict[str, Any]:
    return {
        **asdict(measure.estimate),
        "judge": measure.judge,
        "samples": measure.samples,
        **({"units": measure.units} if measure.units else {}),
        "groups": {
            kind: {name: asdict(estimate) for name, estimate in groups.items()}
            for kind, groups in measure.groups.items()
        },
    }


def _read(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON file of the run folder; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        found = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: damaged ({reason}); remove the file, or run the command again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected fields, got {found!r:.60}; remove the file, or run again")
    return found
