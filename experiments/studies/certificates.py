"""How many requests are certified within a radius, run beside run: the curve of Cohen et al. 2019, of
refusals and of service."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from callbacks.metrics.hierarchical import SeedRate, seed_rate
from callbacks.report.cells import MISSING, Cell, Table
from callbacks.report.certificates import MEANING, THREAT
from callbacks.report.drawing import Drawing, canvas, legend
from callbacks.report.results import Certified
from experiments.studies.comparison import Compared

Found = dict[str, dict[str, list[Certified]]]
"""Subject -> run -> a seed's certificates each."""
PARTS = (0.0, 0.25, 0.5, 0.75)
"""Radii of the table, in parts of the largest that any run has."""


def by_subject(rows: Mapping[str, Compared]) -> Found:
    """What the runs' tests have certified."""
    found: Found = {}
    for name, run in rows.items():
        for own in (one for seed in run.certified for one in seed):
            found.setdefault(own.subject, {}).setdefault(name, []).append(own)
    return found


def share_within(seeds: list[Certified], radius: float) -> SeedRate:
    """Requests certified beyond a radius, over seeds. Raises: ValueError where these had other requests."""
    sizes = sorted({len(own.radii) for own in seeds})
    if len(sizes) > 1:
        raise ValueError(f"certified {seeds[0].subject} requests: expected equally many a seed, got {sizes}")
    return seed_rate(np.array([[float(found > radius) for found in own.radii] for own in seeds]))


def certificate_tables(rows: Mapping[str, Compared]) -> list[Table]:
    """A table a subject: a row a run, shares in percent beyond radii in rho, the mean embedding norm."""
    tables = []
    for subject, runs in by_subject(rows).items():
        largest = max((max(own.radii) for seeds in runs.values() for own in seeds), default=0.0)
        radii = sorted({part * largest for part in PARTS})
        lines = []
        for name, seeds in runs.items():
            shares = [_cell(share_within(seeds, radius)) for radius in radii]
            abstained = sum(own.abstained for own in seeds) / len(seeds)
            lines.append([Cell(name), *shares, _largest(seeds), Cell(f"{abstained:.3g}", abstained)])
        size = max(len(own.radii) for seeds in runs.values() for own in seeds)
        columns = ["run", *(f"beyond {radius:.3g} rho" for radius in radii), "largest radius", "abstained"]
        tables.append(Table(f"Certified: {subject} {MEANING[subject]} (n = {size})", columns, lines))
    return tables


def certificate_curves(rows: Mapping[str, Compared]) -> dict[str, Drawing]:
    """Stem of a file -> share of one subject's requests certified beyond a radius, a line a run."""
    drawings = {}
    for number, (subject, runs) in enumerate(by_subject(rows).items()):
        with canvas() as (figure, axes):
            lines = []
            for name, seeds in runs.items():
                edges = sorted({0.0, *(radius for own in seeds for radius in own.radii)})
                shares = [100 * share_within(seeds, edge).value for edge in edges]
                lines += axes.step(edges, shares, where="post", linewidth=1.3, label=name)
            axes.set(
                xlabel="l2 radius, multiples of rho", ylabel="certified, % of the requests", ylim=(-3, 103)
            )
            legend(axes, lines, [*runs])
        title = f"Certified within a radius: {subject} {MEANING[subject]}"
        drawings[f"certified_{number}"] = Drawing(title, "Higher and farther right is better.", figure)
    return drawings


def threat(rows: Mapping[str, Compared]) -> list[str]:
    """What a certificate says, and what it does not; nothing without any."""
    return [THREAT] if by_subject(rows) else []


def _cell(own: SeedRate) -> Cell:
    text = f"{100 * own.value:.0f} [{100 * own.low:.0f}, {100 * own.high:.0f}]"
    return Cell(text, own.value, (own.low, own.high))


def _largest(seeds: list[Certified]) -> Cell:
    found = max((max(own.radii) for own in seeds), default=0.0)
    return Cell(f"{found:.3g} rho" if found else MISSING, found)
