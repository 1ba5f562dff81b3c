"""The pictures of a report: what changed, robustness against utility, attacks, training curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes

from callbacks.metrics.names import Metric
from callbacks.report.certificates import MEANING, share_at
from callbacks.report.drawing import (
    AFTER,
    BEFORE,
    INK,
    LONGEST,
    Drawing,
    Point,
    canvas,
    label,
    legend,
    mark,
    plain_ticks,
    scatter,
)
from callbacks.report.results import AttackFacts, Estimate, RunResults, Snapshot

CURVES = ("train/loss", "train/loss_toward", "train/loss_away", "train/loss_utility")


def drawings(results: RunResults) -> dict[str, Drawing]:
    """What the results allow to be drawn; the key is a file's stem."""
    every = {
        "changes": changes(results),
        "trade_off": trade_off(results),
        "attack_loss": attack_loss(results),
        "budget": budget(results),
        "training": training(results),
        "certified": certified(results),
        "depth": depth(results),
        "direction": direction(results),
    }
    return {stem: drawing for stem, drawing in every.items() if drawing is not None}


def changes(results: RunResults) -> Drawing | None:
    """Every share as a row of its own: hollow before, filled after, bars for the intervals."""
    after = results.after
    names = [m for m, measure in after.measures.items() if measure.estimate.kind == "rate"] if after else []
    if after is None or not names:
        return None
    with canvas(height=1.2 + 0.32 * len(names)) as (figure, axes):
        for snapshot, color, hollow in _snapshots(results):
            for row, metric in enumerate(names):
                if (measure := snapshot.measures.get(metric)) is not None:
                    value, interval = _percent(measure.estimate)
                    mark(axes, Point(value, row, "", interval, None, hollow, color))
        titles = [label(m.metric.titled(m.judge)) for m in (after.measures[name] for name in names)]
        axes.set_yticks(range(len(names)), titles)
        axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(-3, 103), xlabel="% of the examples")
        axes.grid(alpha=0.2, color=INK)
    seen = "hollow before training, filled after" if results.before else "the model as it is"
    return Drawing("Every rate with its 95 % interval", f"A row a metric; {seen}.", figure)


def trade_off(results: RunResults) -> Drawing | None:
    """Robustness (100 % - success) of every attack against utility."""
    utility = Metric("exact_match", subject="utility")
    points, arrows = [], []
    first: dict[Metric, Point] = {}
    for snapshot, color, hollow in _snapshots(results):
        if utility not in snapshot.measures:
            continue
        x, across = _percent(snapshot.measures[utility].estimate)
        for metric, measure in snapshot.measures.items():
            if metric.quantity != "success_rate":
                continue
            success, (low, high) = _percent(measure.estimate)
            if math.isnan(x) or math.isnan(success):
                continue
            own = Point(x, 100 - success, metric.attack, across, (100 - high, 100 - low), hollow, color)
            points.append(own)
            if metric in first:
                arrows.append((first[metric], own))
            first[metric] = own
    if not points:
        return None
    axes_names = "utility: exact match on benign tasks, %", f"robustness: 100 % - {_success(results)}, %"
    figure = scatter(points, *axes_names, arrows=arrows, y_limits=(-5, 105))
    # Room for the labels goes beyond 0 and 100 %; ticks do not.
    (axes,) = figure.axes
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 100])
    seen = "Hollow before training, filled after." if results.before else ""
    return Drawing("Robustness against utility", f"A point an attack, with 95 % intervals. {seen}", figure)


def _success(results: RunResults) -> str:
    """What the judge that decides calls success."""
    measures = results.after.measures if results.after is not None else {}
    judges = {own.judge for metric, own in measures.items() if metric.quantity == "success_rate"}
    return Metric("success_rate", "harmful").titled(" or ".join(sorted(judges)))


def attack_loss(results: RunResults) -> Drawing | None:
    """The attacked loss at every iterate."""

    def curve(attack: AttackFacts) -> tuple[Sequence[float], Sequence[float]] | None:
        losses = attack.loss_curve
        return (range(len(losses)), losses) if len(losses) > 1 else None

    with canvas() as (figure, axes):
        if not _curves(axes, results, curve):
            return None
        axes.set(xlabel="iterate of the attack", ylabel="loss of the target, nats per token", yscale="log")
        plain_ticks(axes)
    return Drawing("Attack loss against iterates", "Lower: the attack wins. Dashed before training.", figure)


def budget(results: RunResults) -> Drawing | None:
    """Share of examples broken within so many passes."""

    def curve(attack: AttackFacts) -> tuple[Sequence[float], Sequence[float]] | None:
        found = attack.budgets.get("passes")
        return (found.budget, [100 * s for s in found.share]) if found and len(found.budget) else None

    with canvas() as (figure, axes):
        if not _curves(axes, results, curve, drawstyle="steps-post", marker="o", markersize=3):
            return None
        axes.set(
            xlabel="forward and backward passes per example",
            ylabel=f"{_success(results)}, %",
            xscale="symlog",
        )
        axes.set_ylim(-3, 103)
        plain_ticks(axes)
    return Drawing("Success against budget", "Share of the examples broken. Dashed before training.", figure)


def certified(results: RunResults) -> Drawing | None:
    """Share of the requests that are certified beyond a radius, by subject."""
    lines, labels = [], []
    with canvas() as (figure, axes):
        for snapshot, _, hollow in _snapshots(results):
            for i, own in enumerate(snapshot.certified):
                edges = [0.0, *sorted({radius for radius in own.radii if radius > 0})]
                shares = [100 * share_at(own, edge).value for edge in edges]
                style: dict[str, Any] = {"color": f"C{i}", "ls": "--" if hollow and results.compared else "-"}
                lines += axes.step(edges, shares, where="post", **style)
                earlier = ", before" if hollow and results.compared else ""
                labels.append(f"{own.subject}: {MEANING[own.subject]}{earlier}")
        if not lines:
            return None
        axes.set(xlabel="l2 radius, multiples of rho", ylabel="certified, % of the requests", ylim=(-3, 103))
        legend(axes, lines, labels)
    return Drawing("What is guaranteed within a radius", "Higher and farther right is better.", figure)


def depth(results: RunResults) -> Drawing | None:
    """KL to the base model at every token of the harmful reply, with intervals."""
    found = results.after.divergences if results.after is not None else ()
    if not found:
        return None
    with canvas() as (figure, axes):
        positions = range(1, len(found) + 1)
        axes.plot(positions, [own.value for own in found], color=AFTER, marker="o", markersize=3)
        low, high = [max(own.low, 0.0) for own in found], [own.high for own in found]
        axes.fill_between(positions, low, high, color=AFTER, alpha=0.2, linewidth=0)
        axes.set(xlabel="token of the harmful reply", ylabel="KL to the base model, nats", ylim=(0, None))
    seen = "What stands in the first tokens alone is undone by prefilling them."
    return Drawing("How deep training reaches", seen, figure)


def direction(results: RunResults) -> Drawing | None:
    """Cosine of the refusal direction to the one before training after every layer, a line a step that was
    measured; the interval is the last one's."""
    told = [(own.step, own.directions[:-1]) for own in results.snapshots if len(own.directions) > 1]
    if not told:
        return None
    with canvas() as (figure, axes):
        layers = range(len(told[-1][1]))
        lines = [
            axes.plot(
                range(len(found)),
                [own.cosine.value for own in found],
                color=AFTER,
                alpha=(place + 1) / len(told),
                marker="o",
                markersize=3,
            )[0]
            for place, (_, found) in enumerate(told)
        ]
        low, high = ([getattr(own.cosine, end) for own in told[-1][1]] for end in ("low", "high"))
        axes.fill_between(layers, low, high, color=AFTER, alpha=0.2, linewidth=0)
        axes.axhline(1.0, color=BEFORE, linewidth=0.8, ls=":")
        axes.set(xlabel="layer", ylabel="cosine to the direction before training")
        legend(axes, lines, [f"step {step}" for step, _ in told])
    seen = "1: not turned; the band is the last step's 95 % interval."
    return Drawing("How far training turned the refusal direction", seen, figure)


def training(results: RunResults) -> Drawing | None:
    """The losses of training at every optimiser step."""
    with canvas() as (figure, axes):
        drawn = []
        for name in CURVES:
            points = [(row["step"], row[name]) for row in results.training if name in row]
            if points:
                drawn += axes.plot(*zip(*points, strict=True), linewidth=1.3)
                drawn[-1].set_label(name.removeprefix("train/").replace("_", " "))
        if not drawn:
            return None
        axes.set(xlabel="optimiser step", ylabel="nats per token")
        legend(axes, drawn, [str(line.get_label()) for line in drawn])
    return Drawing("Training losses", "Every loss that training logged, by optimiser step.", figure)


def _curves(
    axes: Axes,
    results: RunResults,
    curve: Callable[[AttackFacts], tuple[Sequence[float], Sequence[float]] | None],
    **style: Any,
) -> bool:
    """A line an attack and snapshot, dashed before and solid after; whether there was any."""
    colors: dict[str, str] = {}
    lines, labels = [], []
    for snapshot, _, hollow in _snapshots(results):
        for name, attack in snapshot.attacks.items():
            if (points := curve(attack)) is None:
                continue
            color = colors.setdefault(name, f"C{len(colors) % 10}")
            lines += axes.plot(*points, "--" if hollow else "-", color=color, linewidth=1.3, **style)
            labels.append(f"{label(name, LONGEST // 2)}{', before' if hollow else ''}")
    if lines:
        legend(axes, lines, labels)
    return bool(lines)


def _snapshots(results: RunResults) -> list[tuple[Snapshot, str, bool]]:
    """(snapshot, colour, hollow): the untrained model and the latest one, as far as there are."""
    found = [(results.before, BEFORE, True)] if results.before is not None else []
    # Evaluated at the first step only: there is one model, and it is not trained.
    if results.after is not None and results.after is not results.before:
        found.append((results.after, AFTER, False))
    return found


def _percent(value: Estimate) -> tuple[float, tuple[float, float]]:
    return 100 * value.value, (100 * value.low, 100 * value.high)
