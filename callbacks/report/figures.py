"""The pictures of a report: robustness against utility, attack loss against steps, training curves; and the
HTML around them."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BEFORE, AFTER = "#c44e52", "#4c72b0"
CURVES = ("train/loss", "train/loss_toward", "train/loss_away", "train/loss_utility")


def draw_figures(target: Path, results: dict[str, Any], log: list[dict[str, str]]) -> dict[str, Path]:
    """Draw what the data allows into the folder `target`; returns {title: path}."""
    target.mkdir(exist_ok=True)
    figures = {}
    after = results["after"] or {}
    if "utility_exact_match" in after and any(key.endswith("_attack_success_rate") for key in after):
        figures["Robustness against utility"] = _save(
            target / "trade_off.png", lambda axes: _trade_off(axes, results)
        )
    if any(len(curve) > 1 for curve in after.get("loss_curves", {}).values()):
        figures["Attack loss against steps"] = _save(
            target / "attack_loss.png", lambda axes: _attack_loss(axes, results)
        )
    if any(curves.get("passes", {}).get("budget") for curves in after.get("budgets", {}).values()):
        figures["Success against budget"] = _save(target / "budget.png", lambda axes: _budget(axes, results))
    if log:
        figures["Training curves"] = _save(target / "training.png", lambda axes: _training(axes, log))
    return figures


def html_page(name: str, results: dict[str, Any], table: str, notes: str, figures: dict[str, Path]) -> str:
    """One self-contained page: the tables (blank lines between them), the notes and the figures as embedded
    images."""
    tables = "".join(_html_table(part) for part in table.split("\n\n"))
    paragraphs = "".join(f"<p>{html.escape(note)}</p>" for note in notes.split("\n\n"))
    images = "".join(
        f'<figure><img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, path in figures.items()
    )
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.4rem "
        ".6rem;text-align:left}"
        "img{max-width:100%}figure{margin:2rem 0}figcaption{color:#555}"
    )
    title = f"Report of {html.escape(name)}"
    return (
        '<!doctype html><html lang="en"><meta '
        f'charset="utf-8"><title>{title}</title><style>{style}</style><h1>{title}</h1>'
        f"{tables}{paragraphs}{images}</html>\n"
    )


def _html_table(table: str) -> str:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if not line.startswith("| ---")
    ]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _save(path: Path, draw: Any) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _trade_off(axes: Axes, results: dict[str, Any]) -> None:
    """One colour per attack, hollow before and filled after; robustness = 1 - attack success. Points are set
    apart sideways."""
    suffix = "_attack_success_rate"
    attacks = sorted(key for key in results["after"] if key.endswith(suffix))
    lowest = 100.0
    for number, key in enumerate(attacks):
        color, points = f"C{number}", []
        for snapshot, fill in (("before", "none"), ("after", color)):
            values = results[snapshot] or {}
            utility, success = values.get("utility_exact_match"), values.get(key)
            if utility is None or success is None:
                continue
            (low, high), (left, right) = values["interval"][key], values["interval"]["utility_exact_match"]
            x, y = 100 * utility + 0.6 * (number - (len(attacks) - 1) / 2), 100 * (1 - success)
            points.append((x, y))
            lowest = min(lowest, 100 * left)
            axes.errorbar(
                x, y, xerr=[[100 * max(0, utility - left)], [100 * max(0, right - utility)]],
                yerr=[[100 * max(0, high - success)], [100 * max(0, success - low)]],
                fmt="o", color=color, markerfacecolor=fill, markersize=8, capsize=3,
                label=f"{key.removesuffix(suffix).replace('_', ' ')}, {snapshot}",
            )  # fmt: skip
        if len(points) == 2:
            axes.annotate(
                "", points[1], points[0], arrowprops={"arrowstyle": "->", "color": color, "alpha": 0.5}
            )
    axes.set(
        xlabel="utility: exact match on benign tasks, %",
        ylabel="robustness: 100 % - attack success, %",
        ylim=(-5, 105),
    )
    axes.set_xlim(max(-2.0, lowest - 12), 102)
    axes.set_title("Robustness against utility (95 % intervals)")
    axes.legend(fontsize="small", loc="center left")


def _attack_loss(axes: Axes, results: dict[str, Any]) -> None:
    styles = ("-", "--", ":", "-.")
    for snapshot, color in (("before", BEFORE), ("after", AFTER)):
        curves = (results[snapshot] or {}).get("loss_curves", {})
        searched = {attack: curve for attack, curve in curves.items() if len(curve) > 1}
        for number, (attack, curve) in enumerate(searched.items()):
            own = color if results["before"] else f"C{number % 10}"
            axes.plot(
                range(len(curve)),
                curve,
                styles[number % 4],
                color=own,
                label=f"{attack.replace('_', ' ')}, {snapshot}",
            )
    axes.set_yscale("log")
    axes.set(
        xlabel="attack step",
        ylabel="CE of the harmful target, nats per token",
        title="Attack loss against steps (lower: attack wins)",
    )
    axes.legend(fontsize="small")


def _budget(axes: Axes, results: dict[str, Any]) -> None:
    """Share of examples broken within so many passes, one colour per attack, dashed before and solid
    after."""
    for snapshot, style in (("before", "--"), ("after", "-")):
        for number, (attack, curves) in enumerate((results[snapshot] or {}).get("budgets", {}).items()):
            curve = curves.get("passes", {})
            if curve.get("budget"):
                label = (
                    f"{attack.replace('_', ' ')}, {snapshot}"
                    if results["before"]
                    else attack.replace("_", " ")
                )
                shares = [100 * share for share in curve["share"]]
                axes.step(
                    curve["budget"],
                    shares,
                    style,
                    where="post",
                    color=f"C{number % 10}",
                    marker="o",
                    markersize=3,
                    label=label,
                )
    axes.set_xscale("symlog")
    axes.set(
        xlabel="forward and backward passes per example",
        ylabel="attack success, %",
        ylim=(-3, 103),
        title="Success against budget",
    )
    axes.legend(fontsize="small")


def _training(axes: Axes, log: list[dict[str, str]]) -> None:
    for name in CURVES:
        points = [(int(row["step"]), float(row[name])) for row in log if row.get(name)]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=name.removeprefix("train/").replace("_", " "), linewidth=1.2
            )
    axes.set(xlabel="optimiser step", ylabel="nats per token", title="Training losses")
    axes.legend(fontsize="small")
