"""How figures look and are written: SVG whose text stays text and whose points stay where they are.

Where several points would hide each other, their labels give way, never they. Text is never parsed as
mathematics, can be searched and read aloud, and takes the colour of the page around it.
"""

from __future__ import annotations

import functools
import io
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from callbacks.report.escape import printable

INK = "#010203"
"""Stands for the page's own text colour, which matplotlib has no name for."""
BEFORE, AFTER = "#d1605e", "#4c86c6"
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial"],
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
NEAR = 0.05
"""Points less far apart, as a share of the axis, have their names in one column."""


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


@contextmanager
def canvas(height: float = 3.8) -> Iterator[tuple[Figure, Axes]]:
    """A figure (`height` in inches) and its axes, in this module's looks."""
    with quiet(), mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(6, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        yield figure, axes


@contextmanager
def quiet() -> Iterator[None]:
    """The page's fonts draw the text; what matplotlib's own lack is no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    arrows: Iterable[tuple[Point, Point]] = (),
    y_limits: tuple[float, float] | None = None,
) -> Figure:
    """Points with intervals and their names beside them; points at one place share one label."""
    with canvas(height=4.6) as (figure, axes):
        for start, end in arrows:
            style = {"arrowstyle": "->", "color": INK, "alpha": 0.25}
            axes.annotate("", (end.x, end.y), (start.x, start.y), arrowprops=style)
        for point in points:
            mark(axes, point)
        axes.set(xlabel=x_label, ylabel=y_label)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        axes.margins(x=0.6)
        axes.grid(alpha=0.2, color=INK)
        _number_no_margin(axes, points)
        _name(axes, points)
    return figure


def staircase(axes: Axes, points: Sequence[tuple[float, float]], rising: bool = True) -> None:
    """The Pareto front through its points by their x: what they dominate lies on the line's other side.

    Args:
        rising: whether more of x is better.
    """
    x, y = [own[0] for own in points], [own[1] for own in points]
    axes.step(x, y, where="pre" if rising else "post", color=BEFORE, linewidth=1.2, zorder=0)


@functools.lru_cache(maxsize=16)  # A file of its own and the page hold the same picture.
def svg(drawing: Drawing, prefix: str) -> str:
    """An `<svg>` to put into a page: titled, its ids beginning with `prefix`, its ink the page's."""
    stream = io.StringIO()
    no_date: Mapping[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with quiet(), mpl.rc_context(SETTINGS | {"svg.hashsalt": prefix}):
        FigureCanvasSVG(drawing.figure).print_svg(stream, metadata=dict(no_date))
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = _compact(re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text))
    title, description = escape(printable(drawing.title)), escape(printable(drawing.description))
    named = f'<svg role="img" aria-label="{title}. {description}"'
    head, rest = text.replace("<svg", named, 1).split(">", 1)
    return f"{head}><title>{title}</title><desc>{description}</desc>{rest}"


def _compact(text: str) -> str:
    """The same picture in two thirds of the characters: hundredths of a point, no indentation, and no name of
    what nobody refers to. What is written in it stays as it is."""
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))

    def shorter(tag: re.Match[str]) -> str:
        short = re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])
        return re.sub(r' id="([^"]+)"', lambda own: own[0] if own[1] in used else "", short)

    return re.sub(r"\n +", "\n", re.sub(r"<[^>]+>", shorter, text))


def save(drawing: Drawing, path: Path) -> Path:
    """Write the picture as a file of its own, dark on white."""
    text = svg(drawing, path.stem)
    text = text.replace("<svg", '<svg style="color: #222; background: #fff"', 1)
    path.write_text(text, encoding="utf-8")
    return path


def mark(axes: Axes, point: Point) -> None:
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


def _number_no_margin(axes: Axes, points: Sequence[Point]) -> None:
    """No numbers where there is room for names alone: a share is not below 0 or above 100 %."""
    ends = [end for point in points for end in (point.x, *(point.x_interval or ()))]
    ticks = [float(tick) for tick in axes.get_xticks()]
    if ends and len(ticks) > 1:
        slack = (ticks[1] - ticks[0]) / 2
        kept = [tick for tick in ticks if min(ends) - slack <= tick <= max(ends) + slack]
        if len(kept) > 1:
            limits = axes.get_xlim()
            axes.set_xticks(kept)
            axes.set_xlim(limits)


def _name(axes: Axes, points: Sequence[Point]) -> None:
    """Labels in a column beside each x, clear of the intervals and of each other, each with a line to its
    point."""
    columns: list[list[Point]] = []
    low, high = axes.get_xlim()
    for point in sorted(points, key=lambda point: point.x):
        if columns and point.x - columns[-1][0].x <= NEAR * (high - low):
            columns[-1].append(point)
        else:
            columns.append([point])
    for number, own in enumerate(columns):
        left = number == 0 and len(columns) > 1
        # Of two columns (before and after) each has a side of the figure to itself.
        across = [end for p in (points if len(columns) <= 2 else own) for end in p.x_interval or (p.x,)]
        _column(axes, own, min(across) if left else max(across), left)


def _column(axes: Axes, points: Sequence[Point], edge: float, left: bool) -> None:
    names: dict[tuple[float, float], list[str]] = {}
    for point in sorted(points, key=lambda point: point.y):
        names.setdefault((round(point.y, 6), round(point.x, 6)), []).append(label(point.label))
    texts = ["\n".join(textwrap.wrap(", ".join(dict.fromkeys(own)), 20)) for own in names.values()]
    low, high = axes.get_ylim()
    heights = spread([y for y, _ in names], [text.count("\n") + 1 for text in texts], LINE * (high - low))
    shift = offset_copy(axes.transData, axes.get_figure(root=True), -14 if left else 14, 0, "points")
    for (y, x), text, height in zip(names, texts, heights, strict=True):
        axes.annotate(
            text, xy=(x, y), xytext=(edge, height), textcoords=shift, fontsize=9, va="center",
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


def label(text: str, longest: int = LONGEST) -> str:
    text = printable(text.replace("_", " ").strip(), one_line=True) or "?"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def legend(axes: Axes, lines: Sequence[Line2D], labels: Sequence[str]) -> None:
    """A legend below the axes, which keep their height."""
    columns = 2 if len(lines) > 3 else len(lines)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(lines) // columns))
    figure.legend(lines, labels, loc="outside lower center", ncols=columns)
    axes.grid(alpha=0.2, color=INK)


def plain_ticks(axes: Axes) -> None:
    """Plain numbers: matplotlib writes those of logarithmic axes as mathematics."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "linear":
            axis.set_major_formatter("{x:g}")
            few = LogFormatter(minor_thresholds=(2, 0.5))
            axis.set_minor_formatter(few if axis.get_scale() == "log" else NullFormatter())
