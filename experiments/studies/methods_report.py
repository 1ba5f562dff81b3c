"""From the finished runs of a comparison to a table, a scatter of robustness against utility, and what the
paper's claims come to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib

from callbacks.metrics.estimates import Estimate, wilson_interval
from callbacks.metrics.names import WORST_CASE, WORST_CASE_TEXT, Metric
from callbacks.report.load import load
from callbacks.report.results import RunResults, Snapshot
from callbacks.run_folder.folder import ENVIRONMENT_FILE
from callbacks.run_folder.provenance import environment_facts

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NO_DEFENCE = "no defence"
RATES = {
    "direct": Metric("success_rate", "harmful", "direct"),
    "embedding 0.05": Metric("success_rate", "harmful", "embedding_small"),
    "embedding 0.1": Metric("success_rate", "harmful", "embedding"),
    "soft prompt": Metric("success_rate", "harmful", "soft_prompt"),
    "GCG": Metric("success_rate", "harmful", "gcg"),
    "worst typed": Metric("success_rate", "harmful", WORST_CASE_TEXT),
    "worst": Metric("success_rate", "harmful", WORST_CASE),
    "refuses": Metric("refusal_rate", "harmful"),
    "over-refusal": Metric("over_refusal_rate", "harmless"),
    "utility": Metric("exact_match", "utility"),
}
CLOSE = ("embedding 0.1", "GCG", "refuses", "over-refusal", "utility")


@dataclass(frozen=True)
class Cell:
    """A rate over seeds: the mean, and the Wilson interval of that mean at one seed's n (all seeds judge the
    same rows)."""

    mean: float
    low: float
    high: float
    n: int
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Row:
    """One method."""

    rates: dict[str, Cell]
    passes: float
    """Forward and backward passes of single examples while training, mean over seeds."""
    seconds: float


def read(runs: Mapping[tuple[str, int], Path]) -> dict[str, Row]:
    """Results of finished runs by method. Raises: ValueError where a run was judged by something else."""
    found: dict[str, dict[int, RunResults]] = {}
    for (name, seed), folder in runs.items():
        found.setdefault(name, {})[seed] = load(folder)
    rows = {}
    for name, by_seed in found.items():
        snapshots = {seed: _judged(results, name == NO_DEFENCE) for seed, results in by_seed.items()}
        rates = {
            label: _cell({seed: own.measures[metric].estimate for seed, own in snapshots.items()})
            for label, metric in RATES.items()
        }
        costs = [results.cost for results in by_seed.values()]
        trained = name != NO_DEFENCE
        rows[name] = Row(
            rates, fmean(c["passes"] for c in costs) * trained, fmean(c["seconds"] for c in costs) * trained
        )
    return rows


def _judged(results: RunResults, untrained: bool) -> Snapshot:
    own = results.before if untrained else results.after
    missing = [label for label, metric in RATES.items() if own is None or metric not in own.measures]
    if own is None or missing or not own.complete:
        what = f"no {missing[0]!r}" if missing else "an evaluation that was cut short"
        raise ValueError(f"{results.folder}: {what}; run it again with configs/evaluation/methods.yaml")
    return own


def _cell(by_seed: Mapping[int, Estimate]) -> Cell:
    n = next(iter(by_seed.values())).n
    mean = fmean(estimate.value for estimate in by_seed.values())
    low, high = wilson_interval(mean * n, n)
    return Cell(mean, low, high, n, {seed: estimate.value for seed, estimate in by_seed.items()})


def table(rows: Mapping[str, Row]) -> str:
    """Success rates of attacks and of the model, in percent with 95 % intervals."""
    lines = [
        "| method | " + " | ".join(RATES) + " | passes | seconds |",
        "| --- |" + " --- |" * (len(RATES) + 2),
    ]
    for name, row in rows.items():
        cells = [f"{100 * c.mean:.0f} [{100 * c.low:.0f}, {100 * c.high:.0f}]" for c in row.rates.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row.passes:.0f} | {row.seconds:.0f} |")
    return "\n".join(lines)


def seeds_table(rows: Mapping[str, Row]) -> str:
    """The same by seed, where seeds differ most."""
    labels = ("embedding 0.1", "GCG", "over-refusal", "utility")
    lines = ["| method, by seed | " + " | ".join(labels) + " |", "| --- |" + " --- |" * len(labels)]
    for name, row in rows.items():
        cells = [
            ", ".join(f"{100 * value:.0f}" for value in row.rates[label].by_seed.values()) for label in labels
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _overlap(first: Cell, second: Cell) -> bool:
    return first.low <= second.high and second.low <= first.high


def _pair(rows: Mapping[str, Row], first: str, second: str, label: str) -> str:
    cells = [rows[name].rates[label] for name in (first, second)]
    return ", ".join(
        f"{name} {100 * c.mean:.0f} % [{100 * c.low:.0f}, {100 * c.high:.0f}]"
        for name, c in zip((first, second), cells, strict=True)
    )


def claims(rows: Mapping[str, Row]) -> list[str]:
    """The paper's qualitative claims with the figures that decide them; two rates differ where their
    intervals do not overlap.

    A method beats R2D2 with no more passes, a lower rate of the embedding attack, no higher mean of GCG, and
    utility that does not differ for the worse.
    """
    said: list[str] = []

    def rate(name: str, label: str) -> Cell:
        return rows[name].rates[label]

    def same(first: str, second: str, *labels: str) -> bool:
        return all(_overlap(rate(first, label), rate(second, label)) for label in labels)

    def say(claim: str, holds: bool, first: str, second: str, *labels: str) -> None:
        evidence = "; ".join(f"{label} {_pair(rows, first, second, label)}" for label in labels)
        passes = f"{first} {rows[first].passes:.0f} passes, {second} {rows[second].passes:.0f}"
        said.append(f"**{claim}** {'Holds' if holds else 'Does not hold'} here: {evidence} ({passes}).")

    for method in ("cat", "capo"):
        bare, one, title = f"{method}, no attack", f"{method}, one step", method.upper()
        if {bare, NO_DEFENCE} <= rows.keys():
            robust = not same(bare, NO_DEFENCE, "embedding 0.1", "GCG")
            say(
                f"{title} without the attack gives no robustness.",
                not robust,
                bare,
                NO_DEFENCE,
                "embedding 0.1",
                "GCG",
            )
        if {one, method} <= rows.keys():
            say(f"{title} with one step is close to ten.", same(one, method, *CLOSE), one, method, *CLOSE)
        if {method, "r2d2"} <= rows.keys():
            cheaper = rows[method].passes <= rows["r2d2"].passes
            stronger = rate(method, "embedding 0.1").high < rate("r2d2", "embedding 0.1").low
            no_worse = (
                rate(method, "GCG").mean <= rate("r2d2", "GCG").mean
                and rate(method, "utility").high >= rate("r2d2", "utility").low
            )
            wins = cheaper and stronger and no_worse
            say(
                f"{title} beats R2D2 per compute.",
                wins,
                method,
                "r2d2",
                "embedding 0.1",
                "GCG",
                "utility",
                "over-refusal",
            )
    if {"capo", NO_DEFENCE} <= rows.keys():
        kept = same("capo", NO_DEFENCE, "utility", "over-refusal")
        say("CAPO needs no utility data.", kept, "capo", NO_DEFENCE, "utility", "over-refusal")
    return said


def draw(path: Path, rows: Mapping[str, Row]) -> None:
    """Robustness to GCG and to the embedding attack against utility, a point per method with its
    intervals."""
    figure, panels = plt.subplots(1, 2, figsize=(14, 7.5), layout="constrained", sharey=True)
    for axes, label in zip(panels, ("GCG", "embedding 0.1"), strict=True):
        for number, (name, row) in enumerate(rows.items()):
            attack, utility = row.rates[label], row.rates["utility"]
            x, y = 100 * utility.mean, 100 * (1 - attack.mean)
            axes.errorbar(
                x,
                y,
                xerr=[[max(0.0, x - 100 * utility.low)], [max(0.0, 100 * utility.high - x)]],
                yerr=[[max(0.0, y - 100 * (1 - attack.high))], [max(0.0, 100 * (1 - attack.low) - y)]],
                fmt="os^D"[number // 10 % 4],
                color=f"C{number % 10}",
                markersize=7,
                capsize=2,
                elinewidth=0.7,
                alpha=0.85,
                label=name,
            )
        axes.set(
            xlabel="utility: exact match, %",
            ylabel="robustness: 100 % - attack success, %",
            title=f"{label} against utility (95 % intervals)",
        )
        axes.set(xlim=(100 * min(row.rates["utility"].low for row in rows.values()) - 4, 104), ylim=(-4, 104))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _revision(folder: Path) -> str:
    git = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))["git"]
    return f"{git['revision']}{' modified' if git['modified'] else ''}"


def write_comparison(runs: Mapping[tuple[str, int], Path], out: Path) -> str:
    """Write results.json, report.md, environment.json and the figure; returns the report. Raises: ValueError
    without runs."""
    if not runs:
        raise ValueError("expected finished runs, got none")
    rows, seeds = read(runs), sorted({seed for _, seed in runs})
    out.mkdir(parents=True, exist_ok=True)
    content = {
        name: {
            "passes": row.passes,
            "seconds": row.seconds,
            "rates": {label: vars(cell) for label, cell in row.rates.items()},
        }
        for name, row in rows.items()
    }
    (out / "results.json").write_text(
        json.dumps({"schema": 1, "seeds": seeds, "methods": content}, indent=1) + "\n", encoding="utf-8"
    )
    # The code that ran, beside the code that draws: a comparison may have gone on over several commits.
    revisions = sorted({_revision(folder) for folder in runs.values()})
    facts = environment_facts() | {"revisions_of_runs": revisions}
    (out / ENVIRONMENT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    draw(out / "trade_off.png", rows)
    first = next(iter(rows.values())).rates
    sizes = ", ".join(f"{label} {cell.n}" for label, cell in first.items())
    text = f"""# Training methods on the tiny chat model

Means over seeds {seeds} in percent; in brackets the 95 % Wilson interval of the mean at one seed's n,
because all seeds judge the same rows. n: {sizes}. Attack columns: success, lower is better; `refuses`:
refusals of plain harmful requests, because a success of 0 may also be a reply without sense; worst cases
count the requests that all attacks tried. Passes are forward and backward passes of single examples in
training; seconds are training steps on one thread while another run had the machine's other core.

{table(rows)}

{seeds_table(rows)}

![robustness against utility](trade_off.png)

## What the paper's claims come to

Rates differ where their intervals do not overlap. One method beats another per compute with no more passes,
a lower success of the embedding attack, no higher mean success of GCG, and utility that does not differ for
the worse.

{chr(10).join(f"- {claim}" for claim in claims(rows))}
"""
    (out / "report.md").write_text(text, encoding="utf-8")
    return text
