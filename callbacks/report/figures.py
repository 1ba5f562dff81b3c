"""The pictures of a report as SVG: what changed, robustness against utility, attacks, training curves.

Points are drawn where they are: where several would hide each other, their labels give way, never they.
Text stays text (it can be searched, and read aloud), is never parsed as mathematics, and takes the colour of
the page around it.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, NullFormatter
from matplotlib.transforms import offset_copy

from callbacks.metrics.names import Metric
from callbacks.report.escape import printable
from callbacks.report.results import AttackFacts, Estimate, RunResults, Snapshot

INK = "#010203"
"""Stands for the page's own text colour, which matplotlib has no name for."""
BEFORE, AFTER = "#d1605e", "#4c86c6"
CURVES = ("train/loss", "train/loss_toward", "train/loss_away", "train/loss_utility")
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "font.family": "sans-serif",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
}
LONGEST = 40
"""Characters of a label; the tables hold the whole name."""
LINE = 0.052
"""Height of a label's line as a share of a scatter's axis."""


@dataclass(frozen=True)
class Drawing:
    """A picture and what it says to those who do not see it."""

    title: str
    description: str
    figure: Figure


@dataclass(frozen=True)
class Point:
    """One point of a scatter, in the axes' units."""

    x: float
    y: float
    label: str
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    hollow: bool = False
    color: str = AFTER


def drawings(results: RunResults) -> dict[str, Drawing]:
    """What the results allow to be drawn; the key is a file's stem."""
    every = {
        "changes": changes(results),
        "trade_off": trade_off(results),
        "attack_loss": attack_loss(results),
        "budget": budget(results),
        "training": training(results),
    }
    return {stem: drawing for stem, drawing in every.items() if drawing is not None}


def changes(results: RunResults) -> Drawing | None:
    """Every share as a row of its own: hollow before, filled after, bars for the intervals."""
    after = results.after
    names = [m for m, measure in after.measures.items() if measure.estimate.kind == "rate"] if after else []
    if not names:
        return None
    with _figure(height=1.2 + 0.32 * len(names)) as (figure, axes):
        for snapshot, color, hollow in _snapshots(results):
            for row, metric in enumerate(names):
                if (measure := snapshot.measures.get(metric)) is not None:
                    value, interval = _percent(measure.estimate)
                    _mark(axes, Point(value, row, "", interval, None, hollow, color))
        axes.set_yticks(range(len(names)), [_label(metric.title) for metric in names])
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
            own = Point(x, 100 - success, metric.attack, across, (100 - high, 100 - low), hollow, color)
            points.append(own)
            if metric in first:
                arrows.append((first[metric], own))
            first[metric] = own
    if not points:
        return None
    axes_names = "utility: exact match on benign tasks, %", "robustness: 100 % - attack success, %"
    figure = scatter(points, *axes_names, arrows=arrows, y_limits=(-5, 105))
    seen = "Hollow before training, filled after." if results.before else ""
    return Drawing("Robustness against utility", f"A point an attack, with 95 % intervals. {seen}", figure)


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    arrows: Iterable[tuple[Point, Point]] = (),
    y_limits: tuple[float, float] | None = None,
) -> Figure:
    """Points with intervals and their names beside them; points at one place share one label."""
    with _figure(height=4.6) as (figure, axes):
        for start, end in arrows:
            style = {"arrowstyle": "->", "color": INK, "alpha": 0.25}
            axes.annotate("", (end.x, end.y), (start.x, start.y), arrowprops=style)
        for point in points:
            _mark(axes, point)
        axes.set(xlabel=x_label, ylabel=y_label)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        axes.margins(x=0.35)
        axes.grid(alpha=0.2, color=INK)
        _name(axes, points)
    return figure


def attack_loss(results: RunResults) -> Drawing | None:
    """The attacked loss at every iterate."""

    def curve(attack: AttackFacts) -> tuple[Sequence[float], Sequence[float]] | None:
        losses = attack.loss_curve
        return (range(len(losses)), losses) if len(losses) > 1 else None

    with _figure() as (figure, axes):
        if not _curves(axes, results, curve):
            return None
        axes.set(xlabel="iterate of the attack", ylabel="loss of the target, nats per token", yscale="log")
        _plain_ticks(axes)
    return Drawing("Attack loss against iterates", "Lower: the attack wins. Dashed before training.", figure)


def budget(results: RunResults) -> Drawing | None:
    """Share of examples broken within so many passes."""

    def curve(attack: AttackFacts) -> tuple[Sequence[float], Sequence[float]] | None:
        found = attack.budgets.get("passes")
        return (found.budget, [100 * s for s in found.share]) if found and len(found.budget) else None

    with _figure() as (figure, axes):
        if not _curves(axes, results, curve, drawstyle="steps-post", marker="o", markersize=3):
            return None
        axes.set(
            xlabel="forward and backward passes per example", ylabel="attack success, %", xscale="symlog"
        )
        axes.set_ylim(-3, 103)
        _plain_ticks(axes)
    return Drawing("Success against budget", "Share of the examples broken. Dashed before training.", figure)


def training(results: RunResults) -> Drawing | None:
    """The losses of training at every optimiser step."""
    with _figure() as (figure, axes):
        drawn = []
        for name in CURVES:
            points = [(row["step"], row[name]) for row in results.training if name in row]
            if points:
                drawn += axes.plot(*zip(*points, strict=True), linewidth=1.3)
                drawn[-1].set_label(name.removeprefix("train/").replace("_", " "))
        if not drawn:
            return None
        axes.set(xlabel="optimiser step", ylabel="nats per token")
        _legend(axes, drawn, [str(line.get_label()) for line in drawn])
    return Drawing("Training losses", "Every loss that training logged, by optimiser step.", figure)


def svg(drawing: Drawing, prefix: str) -> str:
    """An `<svg>` to put into a page: titled, its ids beginning with `prefix`, its ink the page's."""
    stream = io.StringIO()
    no_date: Mapping[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with _quiet(), mpl.rc_context(SETTINGS | {"svg.hashsalt": prefix}):
        FigureCanvasSVG(drawing.figure).print_svg(stream, metadata=dict(no_date))
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    title, description = escape(printable(drawing.title)), escape(printable(drawing.description))
    named = f'<svg role="img" aria-label="{title}. {description}"'
    head, rest = text.replace("<svg", named, 1).split(">", 1)
    return f"{head}><title>{title}</title><desc>{description}</desc>{rest}"


def save(drawing: Drawing, path: Path) -> Path:
    """Write the picture as a file of its own, dark on white."""
    text = svg(drawing, path.stem)
    text = text.replace("<svg", '<svg style="color: #222; background: #fff"', 1)
    path.write_text(text, encoding="utf-8")
    return path


def _mark(axes: Axes, point: Point) -> None:
    """One point with its intervals; a hollow one is larger, so that it shows around a filled one."""

    def arms(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
        return (
            None if interval is None else [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
        )

    axes.errorbar(
        point.x, point.y, xerr=arms(point.x, point.x_interval), yerr=arms(point.y, point.y_interval),
        fmt="o", color=point.color, ecolor=(point.color, 0.45), capsize=3, elinewidth=1, alpha=0.9,
        markerfacecolor="none" if point.hollow else point.color,
        markersize=10 if point.hollow else 6,
    )  # fmt: skip


def _name(axes: Axes, points: Sequence[Point]) -> None:
    """Labels in a column beside each x, apart from each other, each with a line to its point."""
    columns: dict[float, dict[float, list[str]]] = {}
    for point in points:
        names = columns.setdefault(round(point.x, 6), {}).setdefault(round(point.y, 6), [])
        if (label := _label(point.label)) not in names:
            names.append(label)
    low, high = axes.get_ylim()
    for number, (x, places) in enumerate(sorted(columns.items())):
        left = number == 0 and len(columns) > 1
        shift = offset_copy(axes.transData, axes.figure, -26 if left else 26, 0, "points")
        texts = ["\n".join(textwrap.wrap(", ".join(names), 26)) for _, names in sorted(places.items())]
        lines = [text.count("\n") + 1 for text in texts]
        for text, y, height in zip(
            texts, sorted(places), spread(sorted(places), lines, LINE * (high - low)), strict=True
        ):
            axes.annotate(
                text, xy=(x, y), xytext=(x, height), textcoords=shift, fontsize=8.5, va="center",
                ha="right" if left else "left", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": INK, "alpha": 0.35, "linewidth": 0.7},
            )  # fmt: skip


def spread(centres: Sequence[float], lines: Sequence[int], line: float) -> list[float]:
    """Centres (ascending) of texts of so many `lines`, moved apart as little as needed so that none overlap.

    Each block of texts that touch stands where its members' wishes average out.
    """
    blocks: list[list[int]] = []
    placed: list[list[float]] = []
    for number in range(len(centres)):
        blocks.append([number])
        placed.append(_stack(centres, lines, line, blocks[-1]))
        while len(blocks) > 1 and _touch(placed[-2][-1], placed[-1][0], lines, blocks, line):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
            placed[-2:] = [_stack(centres, lines, line, blocks[-1])]
    return [height for block in placed for height in block]


def _touch(
    lower: float, upper: float, lines: Sequence[int], blocks: Sequence[Sequence[int]], line: float
) -> bool:
    return upper - lower < line * (lines[blocks[-2][-1]] + lines[blocks[-1][0]]) / 2 - 1e-9


def _stack(centres: Sequence[float], lines: Sequence[int], line: float, block: Sequence[int]) -> list[float]:
    heights = [0.0]
    for below, above in pairwise(block):
        heights.append(heights[-1] + line * (lines[below] + lines[above]) / 2)
    shift = fmean(centres[i] - height for i, height in zip(block, heights, strict=True))
    return [height + shift for height in heights]


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
            labels.append(f"{_label(name, LONGEST // 2)}{', before' if hollow else ''}")
    if lines:
        _legend(axes, lines, labels)
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


def _label(text: str, longest: int = LONGEST) -> str:
    text = printable(text.replace("_", " ").strip(), one_line=True) or "?"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _legend(axes: Axes, lines: Sequence[Line2D], labels: Sequence[str]) -> None:
    """A legend below the axes, which keep their height."""
    columns = 2 if len(lines) > 3 else len(lines)
    assert isinstance(axes.figure, Figure)
    axes.figure.set_figheight(axes.figure.get_figheight() + 0.22 * -(-len(lines) // columns))
    axes.figure.legend(lines, labels, loc="outside lower center", ncols=columns)
    axes.grid(alpha=0.2, color=INK)


def _plain_ticks(axes: Axes) -> None:
    """Plain numbers: matplotlib writes those of logarithmic axes as mathematics."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "linear":
            axis.set_major_formatter("{x:g}")
            few = LogFormatter(minor_thresholds=(2, 0.5))
            axis.set_minor_formatter(few if axis.get_scale() == "log" else NullFormatter())


@contextmanager
def _figure(height: float = 3.8) -> Iterator[tuple[Figure, Axes]]:
    with _quiet(), mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(6, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        yield figure, axes


@contextmanager
def _quiet() -> Iterator[None]:
    """The page's fonts draw the text; what matplotlib's own lack is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
