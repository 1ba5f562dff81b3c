"""Robustness against utility, a point a run, with the Pareto front; only of what was measured in one way."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from callbacks.metrics.names import Metric
from callbacks.metrics.pareto import front
from callbacks.report.drawing import AFTER, BEFORE, INK, Drawing, Point, canvas, mark, staircase
from callbacks.report.results import Estimate, Snapshot
from experiments.compare.runs import Run
from experiments.compare.ways import way_of

MOST = 4
"""Figures, of the attacks that set the runs apart most."""
NUMBERED = 20
"""Points that all bear their number; of more, those on the front."""
FEW = 4
"""Numbers that one place bears."""
UNTRAINED = "#9aa3ad"
WITH_INTERVALS = 30
"""Points whose intervals are drawn; of more the table tells them."""


def pareto(runs: Sequence[Run]) -> dict[str, Drawing]:
    """File stem -> picture, the attacks with the widest range of success first; {} without utility, or
    attacks that two runs have measured alike."""
    metrics = dict.fromkeys(m for run in runs for m in run.after.measures if m.quantity == "success_rate")
    utilities = dict.fromkeys(
        m
        for run in runs
        for m in run.after.measures
        if m.quantity in ("exact_match", "accuracy") and m.subject == "utility" and not m.attack
    )
    numbers = {run.name: number for number, run in enumerate(runs, start=1)}
    candidates: list[tuple[float, list[Run], Metric, Metric]] = []
    for utility in list(utilities)[:1]:
        for metric in metrics:
            own = _alike(runs, metric, utility)
            if len(own) > 1:
                shares = [_measured(run, metric).value for run in own]
                candidates.append((max(shares) - min(shares), own, metric, utility))
    candidates.sort(key=lambda each: -each[0])
    return {
        f"pareto_{place}": _draw(own, numbers, metric, utility)
        for place, (_, own, metric, utility) in enumerate(candidates[:MOST])
    }


def _alike(runs: Sequence[Run], metric: Metric, utility: Metric) -> list[Run]:
    """The most runs that have measured both in one way."""
    groups: dict[object, list[Run]] = defaultdict(list)
    for run in runs:
        success, use = run.measure(metric), run.measure(utility)
        if success is None or use is None or math.isnan(success.estimate.value + use.estimate.value):
            continue
        groups[way_of(success), way_of(use)].append(run)
    return max(groups.values(), key=len, default=[])


def _measured(run: Run, metric: Metric) -> Estimate:
    measure = run.measure(metric)
    assert measure is not None
    return measure.estimate


def _draw(runs: Sequence[Run], numbers: Mapping[str, int], metric: Metric, utility: Metric) -> Drawing:
    places = {
        run.name: (100 * _measured(run, utility).value, 100 - 100 * _measured(run, metric).value)
        for run in runs
    }
    best = front(places, (1, 1))
    with canvas(height=4.6) as (figure, axes):
        untrained = _untrained(runs, metric, utility)
        for point in untrained:
            mark(axes, point)
        for run in runs:
            color, arms = (BEFORE if run.name in best else AFTER), len(runs) <= WITH_INTERVALS
            mark(axes, _point(run.after, metric, utility, color, arms))
        staircase(axes, [places[name] for name in best])
        shared: dict[tuple[float, float], list[str]] = defaultdict(list)
        for name in [*places] if len(runs) <= NUMBERED else best:
            shared[places[name]].append(str(numbers[name]))
        for place, own in shared.items():
            text = ", ".join(own[:FEW]) + (", ..." if len(own) > FEW else "")
            axes.annotate(text, place, (6, 5), textcoords="offset points", fontsize=9, color=INK)
        axes.set(xlabel=f"{utility.title}, %", ylabel="robustness: 100 % - success, %")
        axes.grid(alpha=0.2, color=INK)
        axes.margins(0.12)
        for ticks, setter in ((axes.get_xticks(), axes.set_xticks), (axes.get_yticks(), axes.set_yticks)):
            setter([tick for tick in ticks if 0 <= tick <= 100])
    first = runs[0].measure(metric)
    what = metric.titled(first.judge if first is not None else "")
    lacking = len(numbers) - len(runs)
    left_out = (
        f" {lacking} runs lack one of both, or have measured it in another way, and are not drawn."
        if lacking
        else ""
    )
    says = (
        f"Success: {what}. A point a run, by its number in the table; on the Pareto front, in red: "
        f"{', '.join(f'{numbers[name]} {name}' for name in best[:NUMBERED])}"
        f"{f' and {len(best) - NUMBERED} more' if len(best) > NUMBERED else ''}."
        f"{' Hollow: before training.' if untrained else ''}{left_out}"
    )
    attack = metric.attack.replace("_", " ")
    return Drawing(f"Robustness against utility: {attack}", says, figure)


def _untrained(runs: Sequence[Run], metric: Metric, utility: Metric) -> list[Point]:
    """What the runs began from, once each, hollow; a run whose own before was measured in another way than
    its after holds none (report/load.py)."""
    found: dict[str, Point] = {}
    for run in runs:
        own = run.before
        if own is not None and {metric, utility} <= own.measures.keys():
            found.setdefault(own.model, _point(own, metric, utility, UNTRAINED, arms=False, hollow=True))
    return list(found.values())[:FEW]


def _point(
    own: Snapshot, metric: Metric, utility: Metric, color: str, arms: bool, hollow: bool = False
) -> Point:
    use, success = own.measures[utility].estimate, own.measures[metric].estimate
    across, up = (100 * use.low, 100 * use.high), (100 - 100 * success.high, 100 - 100 * success.low)
    x, y = 100 * use.value, 100 - 100 * success.value
    return Point(x, y, "", across if arms else None, up if arms else None, hollow, color)
