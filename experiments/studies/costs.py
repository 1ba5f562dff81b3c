"""What a study's trainings cost, from their own counters (`cost.json`), and how its attacks went on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from callbacks.report.cells import MISSING, Cell, Table
from callbacks.report.drawing import Drawing, canvas, legend, plain_ticks
from callbacks.report.load import load
from callbacks.run_folder.folder import RunFolder
from experiments.studies.definition import PUBLISHED, Study

Runs = Mapping[str, Mapping[int, Path]]
"""Name -> seed -> folder."""
COLUMNS = (
    "run",
    "updates",
    "attacked examples an update",
    "attack: forward passes an example",
    "backward",
    "passes in all",
    "seconds an update",
    "peak memory, MiB",
)
PAPER = ("paper: forward", "paper: backward", "paper: passes in all", "paper: seconds an update")
"""Columns of published figures, where a study names any, in the order of PUBLISHED."""


def cost_table(study: Study, runs: Runs) -> Table | None:
    """A row per trained run, means over its seeds, beside what a paper says; None where nothing was
    trained."""
    lines = []
    published = any(study.runs[name].paper for name in runs)
    for name, folders in runs.items():
        paths = [RunFolder.of(folder).cost for folder in folders.values()]
        costs = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        if costs:
            said = [study.runs[name].paper.get(own, math.nan) for own in PUBLISHED] if published else []
            lines.append([*_row(name, costs), *(_cell(value, ",.10g") for value in said)])
    columns = [*COLUMNS, *(PAPER if published else ())]
    return Table("Cost of training", columns, lines) if lines else None


def _row(name: str, costs: Sequence[Mapping[str, Any]]) -> list[Cell]:
    def mean(field: str, by: str = "") -> float:
        values = [own[field] / (own[by] if by else 1) for own in costs if own.get(field) is not None]
        return fmean(values) if values else math.nan

    return [
        Cell(name),
        _cell(mean("steps"), ".0f"),
        _cell(mean("adversarial_examples", "steps"), ".3g"),
        _cell(mean("attack_forward_per_example"), ".5g"),
        _cell(mean("attack_backward_per_example"), ".5g"),
        _cell(mean("passes"), ".0f"),
        _cell(mean("seconds", "steps"), ".3g"),
        _cell(mean("peak_memory_mib"), ".0f"),
    ]


def _cell(value: float, form: str) -> Cell:
    return Cell(MISSING if math.isnan(value) else f"{value:{form}}", value)


def curves(study: Study, runs: Runs) -> dict[str, Drawing]:
    """Stem of a file -> the loss at every iterate of one attack, a line a run: its first seed's mean."""
    found = {}
    for number, attack in enumerate(study.curves):
        with canvas() as (figure, axes):
            lines, names = [], []
            for name, folders in runs.items():
                after = load(next(iter(folders.values())), "test").after
                facts = after.attacks.get(attack) if after is not None else None
                if facts is not None and len(facts.loss_curve) > 1:
                    lines += axes.plot(range(len(facts.loss_curve)), facts.loss_curve, linewidth=1.3)
                    names.append(name)
            if not lines:
                continue
            axes.set(
                xlabel="iterate of the attack", ylabel="loss of the target, nats per token", yscale="log"
            )
            plain_ticks(axes)
            legend(axes, lines, names)
        title = f"Loss at every iterate: {attack.replace('_', ' ')}"
        found[f"curve_{number}"] = Drawing(title, "Lower: the attack wins. A line a run, first seed.", figure)
    return found
