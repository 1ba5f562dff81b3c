"""How far trainings have moved the refusal direction, run beside run, from their last tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from callbacks.report.cells import MISSING, Cell, Table
from callbacks.report.drawing import Drawing, canvas, legend
from callbacks.report.results import DirectionAt
from experiments.studies.comparison import Compared

SHOWN = {
    "along": "apart along the old one",
    "length": "apart along the new one",
    "rank_before": "effective rank before",
    "rank": "after training",
}


def by_run(rows: Mapping[str, Compared]) -> dict[str, list[list[DirectionAt]]]:
    """A seed's layers each, their mean at the end, of the runs where they were measured."""
    found = {name: [seed for seed in run.directions if seed] for name, run in rows.items()}
    return {name: seeds for name, seeds in found.items() if seeds}


def direction_tables(rows: Mapping[str, Compared]) -> list[Table]:
    """One table, a row a run: means over layers and seeds, and the layer that turned farthest."""
    lines = []
    for name, seeds in by_run(rows).items():
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


def direction_curves(rows: Mapping[str, Compared]) -> dict[str, Drawing]:
    """Stem of a file -> cosine to the direction before training after every layer, a line a run."""
    found = by_run(rows)
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
