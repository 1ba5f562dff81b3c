"""The comparison in real Chromium, opened as a file: sort, filter, open a row, differences, dark, narrow."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.compare.comparison import write_comparison
from tests.support.chromium import BROWSER, Page, chromium
from tests.support.compared import run_folders

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium in PATH; apt-get install chromium to check the comparison in it"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compared")
    folders = [(path.name, path) for path in run_folders(root / "runs")]
    return write_comparison(folders, "fit", root / "out")


def until(browser: Page, expression: str) -> None:
    """Files beside the page come when they come."""
    end = time.monotonic() + 60
    while not browser.js(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.05)


def names(browser: Page, table: str = "runs") -> list[str]:
    rows = f"[...document.querySelectorAll('#{table} tbody tr')].filter(row => !row.hidden)"
    found: list[str] = browser.js(f"{rows}.map(row => row.cells[0].innerText.trim().split(/\\s+/)[1])")
    return found


def choose(browser: Page, select: str, value: str) -> None:
    browser.js(f"$('{select}').value = {value!r}; $('{select}').dispatchEvent(new Event('change'))")


def column(browser: Page, title: str) -> int:
    heads = "[...document.querySelectorAll('#runs thead th')]"
    found: int = browser.js(f"{heads}.findIndex(head => head.textContent.includes({title!r}))")
    assert found > 0
    return found


def press_head(browser: Page, number: int) -> None:
    browser.js(f"document.querySelectorAll('#runs thead th')[{number}].querySelector('button').click()")


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window(browser: Page, compared: Path, width: int, dark: bool) -> None:
    browser.open(compared, width, dark)
    browser.js("document.querySelectorAll('#runs button.open')[0].click()")
    until(browser, "document.querySelectorAll('#list article').length > 0")
    choose(browser, "beside", "1")
    until(browser, "document.querySelectorAll('#list h5').length > 0")
    browser.js("document.querySelectorAll('details').forEach(details => details.open = true)")
    # Not innerWidth: it counts the vertical scroll bar, and what hides behind it would pass.
    assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    paper, ink = browser.js(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (paper == "rgb(13, 17, 23)") == dark and paper != ink
    field = browser.js("getComputedStyle($('find')).backgroundColor")
    assert field == paper


def test_columns_sort_and_ways_stay_apart(browser: Page, compared: Path) -> None:
    browser.open(compared, 1280)
    assert names(browser) == ["a", "b", "c"]
    press_head(browser, column(browser, "utility: exact match"))
    assert names(browser) == ["c", "a", "b"]
    press_head(browser, column(browser, "utility: exact match"))
    assert names(browser) == ["b", "a", "c"]
    # 0.2 and 0.6 of one way, 0.4 of another: never between them.
    press_head(browser, column(browser, "gcg"))
    assert names(browser) == ["b", "a", "c"]
    press_head(browser, column(browser, "gcg"))
    assert names(browser) == ["a", "b", "c"]


def test_a_column_sorts_by_the_keyboard(browser: Page, compared: Path) -> None:
    browser.open(compared, 1280)
    utility = column(browser, "utility: exact match")
    browser.js(f"document.querySelectorAll('#runs thead th')[{utility}].querySelector('button').focus()")
    for order, sorted_names in (("ascending", ["c", "a", "b"]), ("descending", ["b", "a", "c"])):
        browser.press("Enter", 13)
        assert names(browser) == sorted_names
        assert browser.js("document.activeElement.parentElement.getAttribute('aria-sort')") == order


def test_a_phone_shows_sorts_and_opens_rows_by_touch(browser: Page, compared: Path) -> None:
    browser.open(compared, 390, phone=True)
    # Laid out for the screen, not for a desk's 980 pixels that are shrunk to it.
    assert browser.js("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    assert browser.js("matchMedia('(pointer: coarse)').matches")
    head = f"document.querySelectorAll('#runs thead th')[{column(browser, 'utility: exact match')}]"
    browser.tap(f"{head}.querySelector('button')")
    until(browser, f"{head}.getAttribute('aria-sort') === 'ascending'")
    assert names(browser) == ["c", "a", "b"]
    browser.tap("document.querySelector('#runs tbody tr[data-run=\"1\"] button.open:not(.sign)')")
    until(browser, "document.querySelectorAll('#list article').length > 0")
    assert browser.js("$('of').selectedOptions[0].textContent") == "b"
    assert browser.js("document.documentElement.scrollWidth") == 390


def test_words_and_bounds_filter_all_tables(browser: Page, compared: Path) -> None:
    browser.open(compared, 1280)
    choose(browser, "by", str(column(browser, "gcg") - 1))
    choose(browser, "direction", "-1")
    browser.js("$('bound').value = 40; $('add').click()")
    assert names(browser) == ["b", "c"] and names(browser, "pairs") == ["b", "c"]
    browser.js("$('find').focus()")
    browser.call("Input.insertText", text="0.2")  # b's epsilon, in a column that is not shown
    assert names(browser) == ["b"] and browser.js("$('count').textContent") == "1 of 3 runs"
    browser.js("document.querySelector('#conditions button').click()")
    browser.js("$('find').value = ''; $('find').dispatchEvent(new Event('input'))")
    assert names(browser) == ["a", "b", "c"]


def test_columns_can_be_chosen(browser: Page, compared: Path) -> None:
    browser.open(compared, 1280)
    field = column(browser, "model.attack.epsilon")
    shown = f"!document.querySelector('#runs tbody tr').cells[{field}].hidden"
    assert not browser.js(shown)
    browser.js(f"document.querySelector('.chooser input[value=\"{field - 1}\"]').click()")
    assert browser.js(shown)


def test_a_row_opens_folded_and_shows_only_text(browser: Page, compared: Path) -> None:
    browser.messages.clear()
    browser.open(compared, 1280)
    browser.js("document.querySelectorAll('#runs button.open')[0].focus()")
    browser.press("Enter", 13)
    until(browser, "document.querySelectorAll('#list article').length > 0")
    choose(browser, "set", "Harmful requests: gcg")
    until(browser, "document.querySelectorAll('#list .columns').length === 20 && all[1].attacked")
    first = "document.querySelector('#list article')"
    # A fold hides the key too: it may hold the request.
    assert not browser.js(f"{first}.querySelector('details').open")
    assert "Explain" not in browser.js(f"{first}.innerText")
    browser.js(f"{first}.querySelector('summary').focus()")
    browser.press("Enter", 13)
    shown = browser.js(f"{first}.innerText")
    for text in (
        "Explain harmful 0 ! ! !",
        "</script><img src=x onerror=",
        "target_prefix@1: yes",
        "\\x1b[2J",
    ):
        assert text in shown
    assert browser.js("document.querySelectorAll('#list img, #list script').length") == 0
    assert browser.js("document.title").startswith("Comparison of 3 runs")
    assert browser.messages == []  # nothing failed, nothing was refused by the page's policy


def test_rows_of_two_runs_stand_beside_each_other(browser: Page, compared: Path) -> None:
    browser.open(compared, 1280)
    choose(browser, "of", "0")
    until(browser, "$('set').options.length === 3")
    choose(browser, "set", "Harmful requests: gcg")
    choose(browser, "beside", "1")
    until(browser, "beside && beside.alike && current.title.endsWith('gcg')")
    until(browser, "[...$('verdict').options].some(option => option.value.includes('differs'))")
    choose(browser, "verdict", '["differs","target_prefix@1"]')
    assert browser.js("shown.map(row => row.key).join()") == ",".join(f"harmful/{i:02}" for i in range(4, 12))
    choose(browser, "verdict", '["yes","target_prefix@1"]')
    browser.js("$('words').value = 'reply 11'; $('words').dispatchEvent(new Event('input'))")
    assert browser.js("shown.length") == 1
    # Texts are searched, not what the page calls them.
    browser.js("$('words').value = 'verdicts'; $('words').dispatchEvent(new Event('input'))")
    assert browser.js("shown.length") == 0
    choose(browser, "beside", "2")
    until(browser, "beside && !beside.alike")
    assert "measured in different ways" in browser.js("$('rows-said').textContent")
    assert not browser.js("[...$('verdict').options].some(option => option.value.includes('differs'))")


def test_differences_against_another_run(browser: Page, compared: Path) -> None:
    browser.open(compared, 1280)
    cell = f"document.querySelector('#pairs tbody tr[data-run=\"{{}}\"]').cells[{column(browser, 'gcg')}]"
    assert browser.js(cell.format(1) + ".textContent").startswith("-40.0 [")
    assert browser.js(cell.format(2) + ".textContent") == "not paired: way B against A"
    choose(browser, "baseline", "1")
    until(browser, f"{cell.format(0)}.textContent.startsWith('+40.0 [')")
    assert browser.js(cell.format(0) + ".className") == "worse"
    assert names(browser, "pairs") == ["a", "c"]


def test_the_page_says_what_is_missing_and_runs_no_other_script(
    browser: Page, compared: Path, tmp_path: Path
) -> None:
    html = compared.read_text(encoding="utf-8")
    inserted = "<script>document.title = 'broken'</script></main>"
    (tmp_path / "compare.html").write_text(html.replace("</main>", inserted), encoding="utf-8")
    browser.open(tmp_path / "compare.html", 1280)
    assert browser.js("document.title").startswith("Comparison of 3 runs")
    choose(browser, "of", "0")
    until(browser, "$('rows-said').textContent.includes('is not beside this page')")
    shutil.copytree(compared.parent / "compare_data", tmp_path / "compare_data")
    choose(browser, "of", "0")
    until(browser, "document.querySelectorAll('#list article').length > 0")
