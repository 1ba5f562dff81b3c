"""The page in real Chromium: it fits, sorts by mouse and keyboard, and runs no script but its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from callbacks.report.figures import drawings
from callbacks.report.page import page
from tests.support.chromium import BROWSER, Page, chromium
from tests.support.results import HOSTILE, run_results

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium in PATH; apt-get install chromium to check the report page in it"
)
FIRST = "document.querySelector('section:not(.warnings) table')"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = run_results(attacks=("gcg", "a_name_without_any_space_" * 4, HOSTILE))
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(results, drawings(results)), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window(browser: Page, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width, dark)
    browser.js("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert browser.js("innerWidth") == width
    assert browser.js("document.documentElement.scrollWidth <= innerWidth")
    paper, ink = browser.js(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (paper == "rgb(13, 17, 23)") == dark and paper != ink
    # Figures take their ink from the page.
    text = "document.querySelector('figure svg text')"
    assert browser.js(f"getComputedStyle({text}).fill") == ink


def column(browser: Page, number: int) -> list[str]:
    cells: list[str] = browser.js(f"[...{FIRST}.tBodies[0].rows].map(row => row.cells[{number}].textContent)")
    return cells


def test_a_column_sorts_by_number_and_back(browser: Page, report: Path) -> None:
    browser.open(report, 1280)
    before = column(browser, 4)
    browser.js(f"{FIRST}.querySelectorAll('th button')[4].click()")
    assert column(browser, 4) == sorted(before, key=int)
    assert browser.js(f"{FIRST}.querySelectorAll('th')[4].getAttribute('aria-sort')") == "ascending"
    browser.js(f"{FIRST}.querySelectorAll('th button')[4].click()")
    assert column(browser, 4) == sorted(before, key=int, reverse=True)
    assert sorted(column(browser, 4)) == sorted(before)


def test_a_dash_sorts_last_and_text_by_letters(browser: Page, report: Path) -> None:
    browser.open(report, 1280)
    browser.js(f"{FIRST}.querySelectorAll('th button')[3].click()")
    assert column(browser, 3)[0].startswith("-86.8") and set(column(browser, 3)[1:]) == {"-"}
    browser.js(f"{FIRST}.querySelectorAll('th button')[3].click()")
    assert column(browser, 3)[0].startswith("-86.8") and set(column(browser, 3)[1:]) == {"-"}
    browser.js(f"{FIRST}.querySelectorAll('th button')[5].click()")
    assert column(browser, 5) == sorted(column(browser, 5))
    assert browser.js(f"{FIRST}.querySelectorAll('[aria-sort]').length") == 1


def test_a_column_sorts_by_keyboard(browser: Page, report: Path) -> None:
    browser.open(report, 1280)
    browser.js(f"{FIRST}.querySelectorAll('th button')[3].focus()")
    browser.press("Tab", 9)
    assert browser.js("document.activeElement.textContent") == "n"
    browser.press("Enter", 13)
    assert column(browser, 4) == sorted(column(browser, 4), key=int)


def test_no_text_of_a_reply_runs(browser: Page, report: Path) -> None:
    browser.messages.clear()
    browser.open(report, 1280)
    assert browser.js("document.title") == "Report of example (fit)"
    assert browser.messages == []  # nothing failed, nothing was refused by the page's policy


def test_the_policy_stops_a_script_that_is_not_ours(browser: Page, report: Path, tmp_path: Path) -> None:
    """Even if the escaping failed."""
    path = tmp_path / "report.html"
    inserted = "<script>document.title = 'broken'</script></main>"
    path.write_text(report.read_text(encoding="utf-8").replace("</main>", inserted), encoding="utf-8")
    browser.open(path, 1280)
    assert browser.js("document.title") == "Report of example (fit)"
    assert any("Content Security Policy" in message for message in browser.messages)
