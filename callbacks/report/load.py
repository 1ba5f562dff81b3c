"""RunResults of a run folder, computed from its rows, and their export as results.json.

results.json (schema 3) is an output for other programs, never read here: stage, steps, `before` and `after`
(snapshots, null where there is none), `history` (all snapshots), `differences` (after - before on the same
examples) and cost. A snapshot lists its measures by `Metric.key`, each with value, low, high, n, kind and
judge, and says whether every evaluation behind it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from callbacks.metrics.estimates import paired_difference
from callbacks.report.measured import Measured, events, select, snapshot
from callbacks.report.results import Measure, PairedDifference, RunResults, Snapshot, Stage
from callbacks.report.training_log import read_training_log
from callbacks.run_folder.folder import RunFolder
from datamodules.results import ROWS, read_measurements, read_rows

EXPORT_SCHEMA = 3


def load(folder: str | Path, stage: Stage = "fit") -> RunResults:
    """All that one stage of a run has measured.

    Raises: FileNotFoundError where the stage has measured nothing; ValueError naming file and line of a line
        that is no result, or the file that is damaged.
    """
    folder = Path(folder)
    measurements = read_measurements(folder)
    steps = sorted({item.step for item in measurements if item.stage == stage})
    if not steps:
        raise FileNotFoundError(
            f"{folder / ROWS}: no results of `{stage}`; run `thundercat {stage}` with evaluation callbacks "
            "first"
        )
    rows = read_rows(folder)
    measured = {step: select(measurements, rows, stage, step) for step in steps}
    training = stage == "fit"
    return RunResults(
        folder=folder,
        stage=stage,
        snapshots=[snapshot(own, stage, step) for step, own in measured.items()],
        differences=_differences(measured[0], measured[steps[-1]])
        if training and steps[-1] > 0 and 0 in steps
        else [],
        cost=_read(RunFolder.of(folder).cost) if training else {},
        training=[
            {name: float(value) for name, value in row.items() if value} for row in read_training_log(folder)
        ]
        if training
        else [],
        configuration=_read(RunFolder.of(folder).config(stage)),
        environment=_read(RunFolder.of(folder).environment(stage)),
    )


def _differences(before: Sequence[Measured], after: Sequence[Measured]) -> list[PairedDifference]:
    """What is a rate in both, judged by the same judge, on the examples that both have."""
    earlier = {(e.metric, e.judge): e.outcome for e in events(before)}
    found = []
    for event in events(after):
        outcome = earlier.get((event.metric, event.judge))
        difference = paired_difference(outcome, event.outcome) if outcome is not None else None
        if difference is not None:
            found.append(PairedDifference(event.metric, **vars(difference)))
    return found


def export(results: RunResults) -> dict[str, Any]:
    """What results.json holds."""
    return {
        "schema": EXPORT_SCHEMA,
        "stage": results.stage,
        "steps": [own.step for own in results.snapshots],
        "before": _exported(results.before),
        "after": _exported(results.after),
        "history": [_exported(own) for own in results.snapshots],
        "differences": {
            own.metric.key: {key: value for key, value in asdict(own).items() if key != "metric"}
            for own in results.differences
        },
        "cost": dict(results.cost),
    }


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
    }


def _measure(measure: Measure) -> dict[str, Any]:
    return {
        **asdict(measure.estimate),
        "judge": measure.judge,
        "samples": measure.samples,
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
