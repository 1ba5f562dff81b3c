"""Recorded results are what their own raw rows say, cell by cell, and the README says the same."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from callbacks.report.load import export, load
from callbacks.report.markdown import document, table_text
from callbacks.report.results import Stage
from experiments.studies.archive import archived
from experiments.studies.comparison import answers, read
from experiments.studies.methods_search import OPTIONAL, comparison
from experiments.studies.study_report import cells, exported, replies
from tests.conftest import ROOT

RECORDED = sorted(path.parent.parent for path in ROOT.glob("experiments/results/*/rows/rows_rank0.jsonl.gz"))
QUICKSTART = ROOT / "experiments" / "results" / "quickstart_cpu_202611"
METHODS = ROOT / "experiments" / "results" / "methods_cpu_202611"


@pytest.mark.parametrize("stage", ["fit", "test"])
@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_every_cell_can_be_computed_again_from_the_rows(folder: Path, stage: Stage, tmp_path: Path) -> None:
    prefix = "" if stage == "fit" else f"{stage}_"
    # By itself: nothing but rows, what was to be measured, and the record of the run.
    alone = tmp_path / folder.name
    shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("*results.json", "*report.md", "*figures"))
    results = load(alone, stage)
    recorded = json.loads((folder / f"{prefix}results.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(export(results))) == recorded
    tables = [line for line in document(results, {}).splitlines() if line.startswith("| ")]
    assert len(tables) > 20
    written = (folder / f"{prefix}report.md").read_text(encoding="utf-8")
    assert [line for line in tables if line not in written] == []


def test_the_comparison_of_methods_can_be_computed_again_from_its_rows() -> None:
    if not (METHODS / "results.json").is_file():
        pytest.skip("the comparison of methods is not recorded")
    recorded = json.loads((METHODS / "results.json").read_text(encoding="utf-8"))["runs"]
    chosen = {name: own["setting"] for name, own in recorded.items() if own["setting"]}
    study = comparison([*recorded], [0, 1, 2], chosen)
    rows = read(archived(METHODS, recorded), study.columns, OPTIONAL)
    assert json.loads(json.dumps(exported(rows, chosen))) == recorded
    report = (METHODS / "report.md").read_text(encoding="utf-8")
    for table in (cells(study, rows), replies(study, answers(rows, study.claims, study.columns), rows)):
        assert len(table.rows) > 5
        assert table_text(table) in report


def test_the_readme_s_first_table_is_the_recorded_one() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Running it")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    report = (QUICKSTART / "test_report.md").read_text(encoding="utf-8")
    cells = {
        line.strip("| ").split(" | ")[0]: line.strip("| ").split(" | ")
        for line in reversed(report.splitlines())
        if line.startswith("| ")
    }
    assert len(rows) >= 10
    for metric, before, after, *beside, n in rows:
        name = metric.replace("target prefix", "target prefix (a trend, not success)")
        own = cells[name]
        assert [plain(before), plain(after)] == own[1:3], metric
        assert [plain(cell) for cell in beside] == own[4:6], metric
        assert n == own[6], metric


def plain(cell: str) -> str:
    return re.sub(r"\*\*", "", cell)
