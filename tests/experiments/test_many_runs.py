"""Many runs with many rows at a size for a test: folders, command and steps are those of full size
(`python -m tests.support.many_runs`), which is measured in experiments/LOG.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.compare.comparison import write_comparison
from tests.support.chromium import BROWSER, chromium
from tests.support.compared import unpacked
from tests.support.many_runs import in_browser, run_folders

RUNS, ROWS = 3, 200


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    folders = run_folders(root / "runs", RUNS, ROWS)
    return write_comparison([(path.name, path) for path in folders], "test", root / "out")


def test_every_row_of_every_run_is_in_a_file_of_its_set(compared: Path) -> None:
    data = compared.parent / "compare_data"
    for number in range(RUNS):
        sets = unpacked(data / f"run_{number:03}.js")["sets"]
        sizes = [len(unpacked(data / f"{own['file']}.js")) for own in sets]
        assert sizes == [own["n"] for own in sets] and sum(sizes) == ROWS
        # Half of the rows and more are of one set; those of the model before training stand beside each.
        large = next(own for own in sets if own["n"] == max(sizes))
        assert large["title"] == "Benign tasks" and large["n"] > ROWS / 2
        rows = unpacked(data / f"{large['file']}.js")
        assert all("before" in row for row in rows) and f"({number}.0)" in rows[0]["reply"]


@pytest.mark.skipif(BROWSER is None, reason="no chromium in PATH; apt-get install chromium to check it")
def test_the_page_answers_and_forgets_sets_that_were_not_used_for_long(compared: Path) -> None:
    with chromium() as browser:
        browser.messages.clear()
        answered = in_browser(browser, compared)
        assert {"open", "filter_key", "largest_set", "rows_key"} <= {*answered}
        assert all(wall > 0 for wall, _ in answered.values())
        assert sum(used for _, used in answered.values()) > 0
        files = "(await load('run_000')).sets.map((own) => own.file)"
        loaded = "[...asked.keys()].filter((own) => own.startsWith('rows_'))"
        browser.js(f"(async () => {{ for (const file of {files}) await load(file); }})()")
        assert browser.js(f"{loaded}.length === KEPT && !{loaded}.includes('rows_000_000')")
        assert browser.js("load('rows_000_000').then((rows) => rows.length)") == 2
        assert browser.messages == []
