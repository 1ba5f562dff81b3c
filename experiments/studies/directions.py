"""How far trainings have moved the refusal direction, run beside run, from their last tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from callbacks.report.cells import MISSING, Cell, Table
from callbacks.report.directions import QUANTITY
from callbacks.report.drawing import Drawing, canvas, legend
from callbacks.report.load import load
from callbacks.report.results import DirectionAt
from experiments.studies.definition import Study

Found = Mapping[str, list[list[DirectionAt]]]
"""Run -> a seed's layers each, their mean at the end."""
SHOWN = {
    "along": "apart along the old one",
    "length": "apart along the new one",
    "rank_before": "effective rank before",
    "rank": "after training",
}


def directions(study: Study, runs: Mapping[str, Mapping[int, Path]]) -> Found:
    """Of the reported runs, where a column asks for it; empty where none does."""
    if all(column.quantity != QUANTITY for column in study.columns.values()):
        return {}
    found = {}
    for name in (own for own in study.reported if own in runs):
        seeds = [load(folder, "test").after for folder in runs[name].values()]
        told = [[*after.directions] for after in seeds if after is not None and after.directions]
        if told:
            found[name] = told
    return found


def direction_tables(found: Found) -> list[Table]:
    """One table, a row a run: means over layers and seeds, and the layer that turned farthest."""
    lines = []
    for name, seeds in found.items():
        cosines = _over_seeds(seeds)
        # A direction that is nothing but noise has no angle.
        layer = min(range(len(cosines)), key=lambda place: (math.isnan(cosines[place]), cosines[place]))
        means = {key: fmean(getattr(own[-1], key) for own in seeds) for key in SHOWN}
        lines.append(
            [
                Cell(name),
                _number(fmean(own[-1].cosine.value for own in seeds)),
                Cell(f"{cosines[layer]:.3g} (layer {layer})", cosines[layer]),
                *map(_number, means.values()),
            ]
        )
    columns = ["run", "cosine to the old one", "where it turned farthest", *SHOWN.values()]
    return [Table("How far training moved the refusal direction", columns, lines)] if lines else []


def direction_curves(found: Found) -> dict[str, Drawing]:
    """Stem of a file -> cosine to the direction before training after every layer, a line a run."""
    if not found:
        return {}
    with canvas() as (figure, axes):
        lines = []
        for name, seeds in found.items():
            cosines = _over_seeds(seeds)
            lines += axes.plot(range(len(cosines)), cosines, marker="o", markersize=3, label=name)
        axes.axhline(1.0, color="#888888", linewidth=0.8, ls=":")
        axes.set(xlabel="layer", ylabel="cosine to the direction before training")
        legend(axes, lines, [*found])
    seen = "1: not turned. Means over seeds, without the bias of finitely many requests."
    return {"direction_0": Drawing("How far training turned the refusal direction", seen, figure)}


def _over_seeds(seeds: list[list[DirectionAt]]) -> list[float]:
    """Of every layer, the mean at the end left out."""
    return [fmean(own.cosine.value for own in layer) for layer in [*zip(*seeds, strict=True)][:-1]]


def _number(value: float) -> Cell:
    return Cell(MISSING if math.isnan(value) else f"{value:.3g}", value)
