"""The comparison of runs as files: compare.html, the data that it loads when asked, and leaderboards."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from tqdm.auto import tqdm

from callbacks.report.page import pictures, rendered
from callbacks.report.results import Stage
from callbacks.report.tables import INTERVALS, judges
from callbacks.run_folder.provenance import write_whole
from experiments.compare.columns import Column, columns_of, rows_of
from experiments.compare.configurations import Differing, configuration_table, differing
from experiments.compare.differences import PairCell, Pairs
from experiments.compare.drill_down import write_packed, write_run
from experiments.compare.figures import pareto
from experiments.compare.leaderboard import as_csv, as_markdown
from experiments.compare.runs import Run, kept, read
from experiments.compare.ways import Ways, ways_of, ways_table

PAGE, DATA = "compare.html", "compare_data"
DIFFERENCES = (
    "On the same examples, in percentage points, with a 95 % interval and the exact McNemar p; + and - count "
    "the examples that gained and lost the event. Marked are differences whose interval lies on one side of "
    "0: \u25b2 better, \u25bc worse. Nothing is corrected for their number: of twenty runs that differ in "
    "nothing, one is expected to be marked. What was measured in different ways is not paired."
)


def write_comparison(
    folders: Sequence[tuple[str, Path]],
    stage: Stage,
    out: Path,
    baseline: int = 0,
    leaderboards: Sequence[str] = (),
    title: str = "",
) -> Path:
    """Write the page, its data and leaderboards; returns the page.

    Args:
        folders: (name, run folder), in the order in which they are shown.
        stage: what is shown of them.
        out: folder that is written to; an earlier comparison there is replaced.
        baseline: number of the run that differences are taken against at first.
        leaderboards: `csv`, `markdown` or both.

    Raises: ConfigError naming a folder that is damaged; nothing has been replaced then.
    """
    out.mkdir(parents=True, exist_ok=True)
    data = out / f"{DATA}.partial"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    try:
        runs = _read_all(folders, stage, out, data)
        ways, fields = ways_of(runs), differing(runs)
        columns = columns_of(runs, ways, fields)
        pairs = Pairs(runs, columns, ways)
        differences = _write_pairs(pairs, baseline, data)
        (out / PAGE).unlink(missing_ok=True)  # a page never stands beside the data of another one
        shutil.rmtree(out / DATA, ignore_errors=True)
        data.rename(out / DATA)
    finally:
        shutil.rmtree(data, ignore_errors=True)
    html = page(runs, columns, ways, fields, pairs, differences, baseline, title)
    write_whole(out / PAGE, html)
    for kind in leaderboards:
        text = as_csv(runs, columns, ways) if kind == "csv" else as_markdown(runs, columns, ways)
        write_whole(out / f"leaderboard.{'csv' if kind == 'csv' else 'md'}", text)
    return out / PAGE


def _read_all(folders: Sequence[tuple[str, Path]], stage: Stage, out: Path, data: Path) -> list[Run]:
    """One after the other: the texts of a run are on disk before the next one is read."""

    def one(number: int, name: str, folder: Path) -> Run:
        # Its rows are gone when this returns: two runs of them are never in memory.
        results, measured = read(folder, stage)
        write_run(data, number, results, measured)
        return kept(name, results, measured, out)

    counted = enumerate(tqdm(folders, desc="compare", unit="run", disable=None))
    return [one(number, name, folder) for number, (name, folder) in counted]


def _write_pairs(pairs: Pairs, baseline: int, data: Path) -> list[list[PairCell]]:
    """A file a run, of all others against it; returns those of the baseline, with its perplexities."""
    shown = pairs.against(baseline)
    for number, own in pairs.texts(baseline).items():
        for place, metric in enumerate(pairs.metrics):
            shown[number][place] = own.get(metric, shown[number][place])
    for number in range(len(pairs.runs)):
        cells = shown if number == baseline else pairs.against(number)
        packed = [
            [[own.text, None if math.isnan(own.order) else own.order, own.kind] for own in row]
            for row in cells
        ]
        write_packed(data, f"pairs_{number:03}", packed)
    return shown


def page(
    runs: Sequence[Run],
    columns: Sequence[Column],
    ways: Ways,
    fields: Sequence[Differing],
    pairs: Pairs,
    differences: Sequence[Sequence[PairCell]],
    baseline: int,
    title: str = "",
) -> str:
    """The page's HTML."""
    groups: dict[str, list[tuple[int, Column]]] = {}
    for number, column in enumerate(columns):
        groups.setdefault(column.group, []).append((number, column))
    by_metric = {column.metric: (n, column) for n, column in enumerate(columns) if column.metric is not None}
    tables = [configuration_table(runs, fields), ways_table(runs, ways)]
    about = {"folder": DATA, "scales": [100 if column.percent else 1 for column in columns]}
    texts = any(run.texts for run in runs)
    return rendered(
        "compare.html.jinja",
        ("compare.js",),
        ("compare.css",),
        title=title or f"Comparison of {len(runs)} run{'s' if len(runs) > 1 else ''}",
        stage=runs[0].results.stage,
        notes=[INTERVALS],
        warnings=warnings(runs, ways),
        rows=rows_of(runs, columns, ways, fields),
        columns=columns,
        groups=groups,
        judges=list(dict.fromkeys(line for run in runs for line in judges(run.results))),
        figures=pictures(pareto(runs)),
        difference_note=DIFFERENCES
        + (f" Perplexities are paired with {runs[baseline].name} alone." if texts else ""),
        baseline=baseline,
        paired=[by_metric[metric] for metric in pairs.metrics],
        differences=differences,
        tables=[table for table in tables if table.rows],
        about=_inline(about),
    )


def warnings(runs: Sequence[Run], ways: Ways) -> list[str]:
    """What keeps numbers of the runs from being compared."""
    found = []
    shown = [metric.title for metric in ways if not metric.quantity.endswith("_per_example")]
    if shown:
        found.append(
            "Measured in different ways (judge, attack and its budget, length of replies, seed or rows), "
            f"marked A, B, ... and neither paired nor ranked together: {_some(shown)}. A table below says "
            "whose they are."
        )
    cut = [run.name for run in runs if not run.after.complete]
    if cut:
        found.append(f"An evaluation was cut short, numbers are over the rows that are there: {_some(cut)}.")
    bare = [run.name for run in runs if not run.results.configuration]
    if bare and len(runs) > 1:
        found.append(f"Without a recorded configuration, so no differences of it: {_some(bare)}.")
    models: dict[str, list[str]] = {}
    for run in runs:
        models.setdefault(run.after.model, []).append(run.name)
    found += [f"The same weights: {_some(own)}." for own in models.values() if len(own) > 1]
    return found


def _some(names: Sequence[str], most: int = 12) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _inline(value: Mapping[str, object]) -> Markup:
    """JSON within a script element, which only `<` could end."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))
