"""A study's page in real Chromium, opened as a file: its tables are narrowed by words and sorted."""

from __future__ import annotations

from pathlib import Path

import pytest

from callbacks.report.cells import Cell, Table
from callbacks.report.page import study_page
from tests.support.chromium import BROWSER, chromium

RUNS = [("no defence", 0.9), ("cat", 0.1), ("cat, one step", 0.2)]
TABLES = [
    Table("Results", ["run", "embedding"], [[Cell(name), Cell(f"{value}", value)] for name, value in RUNS]),
    Table(
        "Questions",
        ["question", "says"],
        [[Cell("CAT helps"), Cell("lower")], [Cell("x"), Cell("equivalent")]],
    ),
]


def test_a_page_has_one_field_for_all_of_its_tables_and_loads_nothing() -> None:
    page = study_page("A study", [], TABLES, {}, {"Rows": "runs"})
    assert page.count('type="search"') == 1
    assert '<a href="runs">Rows</a>' in page
    assert "src=" not in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.skipif(BROWSER is None, reason="no chromium in PATH; apt-get install chromium to check the page")
def test_words_narrow_all_tables_and_a_head_sorts(tmp_path: Path) -> None:
    place = tmp_path / "report.html"
    place.write_text(study_page("A study", [], TABLES, {}), encoding="utf-8")
    with chromium() as browser:
        browser.open(place, 900)

        def look(words: str) -> list[str]:
            browser.js(f"find.value = {words!r}; find.dispatchEvent(new Event('input'))")
            seen = "[...document.querySelectorAll('tbody tr')].filter(row => row.offsetParent)"
            found: list[str] = browser.js(f"{seen}.map(row => row.cells[0].innerText.trim())")
            return found

        assert look("") == ["no defence", "cat", "cat, one step", "CAT helps", "x"]
        assert look("CAT one") == ["cat, one step"]
        assert browser.js("count.textContent") == "1 of 5 rows"
        assert browser.js("document.querySelectorAll('section.table')[1].hidden") is True
        assert look("equiv") == ["x"]
        browser.js("document.querySelectorAll('th button')[1].click()")
        assert look("")[:3] == ["cat", "cat, one step", "no defence"]
        browser.js("document.dispatchEvent(new KeyboardEvent('keydown', {key: '/'}))")
        assert browser.js("document.activeElement.id") == "find"
