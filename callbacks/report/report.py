"""results.json, report.md and report.html of a run: before and after, beside each other, with n, intervals
and cost."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from callbacks.evaluations.base import EVALUATIONS_FILE
from callbacks.report.figures import draw_figures, html_page
from callbacks.run_folder.folder import RunFolder
from callbacks.run_folder.loggers import csv_logs

NAMES = {
    "harmful/refusal_rate": "harmful_refusal_rate",
    "harmless/over_refusal_rate": "over_refusal_rate",
    "utility/exact_match": "utility_exact_match",
    "worst_case/success_rate": "worst_case_attack_success_rate",
}
ATTACK_SUFFIX = "/success_rate"
MEAN_SUFFIXES = (
    "/loss_start",
    "/loss_best",
    "/passes_per_example",
    "/queries_per_example",
    "/seconds_per_example",
)


class RunReport(Callback):
    """Writes the report when training, validation or testing has ended and prints its table."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "fit")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write(trainer, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "test")

    def _write(self, trainer: Trainer, stage: str) -> None:
        if trainer.is_global_zero and (Path(trainer.default_root_dir) / EVALUATIONS_FILE).is_file():
            print(write_report(trainer.default_root_dir, stage))


def write_report(folder: str | Path, stage: str = "fit") -> str:
    """Write the report files of a run folder and return the table as text.

    The report of `validate` or `test` has the stage's name in front of its files' and shows one model.

    Raises: FileNotFoundError where the folder holds no evaluations.
    """
    prefix = "" if stage == "fit" else f"{stage}_"
    folder = Path(folder)
    if not (folder / EVALUATIONS_FILE).is_file():
        raise FileNotFoundError(
            f"no {EVALUATIONS_FILE} in {folder}; run `thundercat fit` with evaluation callbacks first"
        )
    entries = [
        json.loads(line) for line in (folder / EVALUATIONS_FILE).read_text(encoding="utf-8").splitlines()
    ]
    results = summarise(entries, stage)
    results["cost"] = (
        json.loads(RunFolder(folder).cost.read_text(encoding="utf-8"))
        if RunFolder(folder).cost.is_file()
        else {}
    )
    (folder / f"{prefix}results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = markdown_table(results)
    figures = draw_figures(
        folder / f"{prefix}figures", results, read_training_log(folder) if stage == "fit" else []
    )
    pictures = "\n".join(f"![{title}]({prefix}figures/{path.name})\n" for title, path in figures.items())
    table = "\n\n".join(part for part in (table, category_table(results)) if part)
    text = f"# Report of {folder.name}\n\n{table}\n\n{_notes(results)}\n\n{pictures}"
    (folder / f"{prefix}report.md").write_text(text, encoding="utf-8")
    (folder / f"{prefix}report.html").write_text(
        html_page(folder.name, results, table, _notes(results), figures), encoding="utf-8"
    )
    return f"\n{table}\n\n{_notes(results)}\n\nreport: {folder / f'{prefix}report.html'}"


def summarise(entries: list[dict[str, Any]], stage: str = "fit") -> dict[str, Any]:
    """`before` (first evaluation of the model inside fit) and `after` (last), each {metric: rate, n: {...},
    interval: {...}}.

    Outside `fit` there is no `before`.
    """
    by_step: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        if entry["stage"] == stage:
            by_step[entry["step"]].append(entry)
    steps = sorted(by_step)
    results: dict[str, Any] = {"schema": 2, "stage": stage, "steps": steps}
    starts_untrained = stage == "fit" and steps[:1] == [0]
    for name, step in (
        ("before", steps[0] if starts_untrained else None),
        ("after", steps[-1] if steps else None),
    ):
        results[name] = _snapshot(by_step[step]) if step is not None else None
    results["history"] = [{"step": step, **_snapshot(by_step[step])} for step in steps]
    return results


def _snapshot(entries: list[dict[str, Any]]) -> dict[str, Any]:
    snapshot: dict[str, Any] = {
        "n": {},
        "interval": {},
        "means": {},
        "loss_curves": {},
        "judges": {},
        "attack_flags": {},
        "budgets": {},
        "categories": {},
        "bootstrap": {},
    }
    for entry in entries:
        metrics = entry["metrics"]
        for key, value in metrics.items():
            if key.endswith(MEAN_SUFFIXES):
                snapshot["means"][key] = {"mean": value} | {
                    part: metrics[f"{key}/{part}"] for part in ("low", "high", "n")
                }
            elif f"{key}/n" in metrics:
                name = _metric_name(key)
                snapshot[name] = value
                snapshot["n"][name] = metrics[f"{key}/n"]
                snapshot["interval"][name] = [metrics[f"{key}/low"], metrics[f"{key}/high"]]
        if "judge" in entry["details"]:
            snapshot["judges"][entry["name"]] = entry["details"]["judge"]
        for attack, detail in entry["details"].items():
            if isinstance(detail, dict) and "loss_curve" in detail:
                snapshot["loss_curves"][attack] = detail["loss_curve"]
                snapshot["attack_flags"][attack] = detail["flags"]
                snapshot["budgets"][attack] = detail.get("success_by_budget", {})
            if isinstance(detail, dict) and "bootstrap" in detail:
                snapshot["bootstrap"][attack] = detail["bootstrap"]
            for kind in ("by_category", "by_functional"):
                if isinstance(detail, dict) and kind in detail:
                    snapshot["categories"].setdefault(attack, {})[kind.removeprefix("by_")] = detail[kind]
        for flag, count in entry["details"].get("cross_flags", {}).items():
            snapshot["attack_flags"].setdefault("the suite", {})[flag] = count
    return snapshot


def _metric_name(key: str) -> str:
    if key in NAMES:
        return NAMES[key]
    if key.endswith(ATTACK_SUFFIX):
        return f"{key.removesuffix(ATTACK_SUFFIX)}_attack_success_rate"
    return key.replace("/", "_")


def markdown_table(results: dict[str, Any]) -> str:
    """The metrics before and after (outside `fit` of one model), with 95 % intervals and n."""
    before, after = results["before"] or {}, results["after"] or {}
    if results.get("stage", "fit") != "fit":
        lines = ["| metric | rate | n |", "| --- | --- | --- |"]
        return "\n".join(
            lines
            + [
                f"| {n.replace('_', ' ')} | {_cell(after, n)} | {k:.0f} |"
                for n, k in after.get("n", {}).items()
            ]
        )
    lines = ["| metric | before | after | n |", "| --- | --- | --- | --- |"]
    for name in after.get("n", {}):
        lines.append(
            f"| {name.replace('_', ' ')} | {_cell(before, name)} | {_cell(after, name)} | "
            f"{after['n'][name]:.0f} |"
        )
    return "\n".join(lines)


def category_table(results: dict[str, Any]) -> str:
    """Worst-case success by the behaviours' categories, '' where there is one category or no suite."""
    kinds = (results["after"] or {}).get("categories", {}).get("worst_case", {})
    rows = [(kind, name, value) for kind, by_name in kinds.items() for name, value in by_name.items()]
    if not rows:
        return ""
    lines = ["| worst case by category (after) | success | n |", "| --- | --- | --- |"]
    return "\n".join(
        lines
        + [
            f"| {kind}: {name.replace('_', ' ')} | {_percent(value)} | {value['n']:.0f} |"
            for kind, name, value in rows
        ]
    )


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['rate']:.1f} % [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _cell(snapshot: dict[str, Any], name: str) -> str:
    if name not in snapshot or snapshot[name] is None or math.isnan(snapshot[name]):
        return "-"
    low, high = snapshot["interval"][name]
    return _percent({"rate": snapshot[name], "low": low, "high": high})


def _notes(results: dict[str, Any]) -> str:
    after, cost = results["after"] or {}, results["cost"]
    notes = [
        "Intervals are 95 % Wilson intervals; success of an attack is a reply that begins with the "
        "harmful target's first sentence."
    ]
    if after.get("judges"):
        notes.append("Judges: " + ", ".join(sorted(set(after["judges"].values()))) + ".")
    for attack, flags in after.get("attack_flags", {}).items():
        raised = [f"{name} {count}" for name, count in flags.items() if count]
        if raised:
            notes.append(f"Attack health of {attack} (after): {', '.join(raised)} of the examples.")
    if cost:
        notes.append(
            f"Cost: {cost['steps']:.0f} steps, {cost['seconds']:.0f} s, "
            f"{cost['tokens_per_second']:.0f} tokens/s, "
            f"{cost['attack_forward_per_example']:.1f} forward and "
            f"{cost['attack_backward_per_example']:.1f} backward attack passes per "
            f"adversarial example, {cost['passes']:.0f} passes in all, peak memory "
            f"{cost['peak_memory_mib']:.0f} MiB."
        )
    return "\n\n".join(notes)


def read_training_log(folder: Path) -> list[dict[str, str]]:
    """Training rows of the run's CSV logs; where a run was resumed, the later log replaces what it
    repeats."""
    rows: list[dict[str, str]] = []
    for path in csv_logs(folder):
        with path.open(encoding="utf-8", newline="") as stream:
            part = [row for row in csv.DictReader(stream) if row.get("train/loss")]
        if part:
            rows = [row for row in rows if int(row["step"]) < int(part[0]["step"])] + part
    return rows
