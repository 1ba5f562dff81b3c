"""Reports that lied, crashed, or passed a reply's control sequences on."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from callbacks.report.drawing import svg
from callbacks.report.figures import drawings
from callbacks.report.markdown import document, terminal
from callbacks.report.page import page
from callbacks.report.results import RunResults
from callbacks.report.tables import tables
from tests.support.results import HOSTILE, UTILITY, rate, run_results, success

NAMES = ("direct", "embedding", "gcg", "worst_case")
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def crowded() -> RunResults:
    """Six attacks of almost the same success: what the old figure moved apart."""
    results = run_results(attacks=("gcg", "pair", "best_of_n", "soft_prompt"))
    after = results.snapshots[1]
    extra = {success(f"attack_{i}"): rate(success(f"attack_{i}"), 0.01 * i) for i in range(6)}
    return replace(results, snapshots=[results.snapshots[0], replace(after, measures=after.measures | extra)])


def test_a16_trade_off_points_are_where_they_were_measured() -> None:
    results = crowded()
    axes = drawings(results)["trade_off"].figure.axes[0]
    drawn = {
        (round(float(x), 6), round(float(y), 6))
        for container in axes.containers
        for x, y in zip(*container.lines[0].get_data(), strict=True)
    }
    expected = {
        (
            round(100 * snapshot.measures[UTILITY].estimate.value, 6),
            round(100 - 100 * m.estimate.value, 6),
        )
        for snapshot in results.snapshots
        for m in snapshot.measures.values()
        if m.metric.quantity == "success_rate"
    }
    assert drawn == expected


def test_a16_trade_off_points_in_the_svg_are_where_the_axes_say() -> None:
    """Read from the file: the markers' places, scaled by the tick marks, give the data back."""
    root = ElementTree.fromstring(svg(drawings(crowded())["trade_off"], "t"))
    ticks: dict[str, list[tuple[float, float]]] = {"x": [], "y": []}
    for group in root.iter(f"{SVG}g"):
        # A tick: a grid line, a mark and its number, centred beneath the one axis, not at the other.
        label, marks = group.find(f"./{SVG}g/{SVG}text"), list(group.iter(f"{SVG}use"))
        if label is None or len(marks) != 1 or not re.fullmatch(r"[\d.]+", label.text or ""):
            continue
        axis = "x" if "text-anchor: middle" in label.get("style", "") else "y"
        ticks[axis].append((float(marks[0].get(axis) or ""), float(label.text or "")))
    assert all(len(own) > 2 for own in ticks.values())

    def value(axis: str, place: float) -> float:
        (first, low), (last, high) = ticks[axis][0], ticks[axis][-1]
        return low + (place - first) * (high - low) / (last - first)

    markers = [
        (value("x", float(use.get("x", "nan"))), value("y", float(use.get("y", "nan"))))
        for use in root.iter(f"{SVG}use")
        if float(use.get("x", "nan")) > ticks["x"][0][0]
    ]
    for i in range(6):
        assert any(abs(x - 97.8) < 0.01 and abs(y - (100 - i)) < 0.05 for x, y in markers), i


def test_a16_the_judge_of_a_success_is_the_one_that_judged() -> None:
    results = run_results()
    after = results.snapshots[1]
    measures = dict(after.measures)
    measures[success("gcg")] = rate(success("gcg"), 0.5, judge="harmbench_classifier@3")
    results = replace(results, snapshots=[results.snapshots[0], replace(after, measures=measures)])
    row = next(row for row in tables(results)[0].rows if row[0].text.startswith("gcg"))
    assert row[-1].text == "harmbench_classifier@3"
    for text in (document(results, {}), page(results, {})):
        assert "first sentence" not in text


def test_a16_a_test_report_shows_no_training_cost() -> None:
    results = replace(run_results(stage="test"), cost={"steps": 150.0, "seconds": 142.0})
    for text in (page(results, {}), document(results, {}), terminal(results)):
        assert "Cost" not in text


@pytest.mark.parametrize("name", ["$\\frac{$", "$x$", "_hidden", "a&b<c>", "中文", HOSTILE])
def test_b_an_attacks_name_is_text_in_every_figure(name: str) -> None:
    for stem, drawing in drawings(run_results(attacks=(name,))).items():
        root = ElementTree.fromstring(svg(drawing, stem))
        shown = " ".join(element.text or "" for element in root.iter(f"{SVG}text"))
        assert "mathdefault" not in shown
        if stem in ("attack_loss", "budget"):
            assert name.strip("_")[:4] in shown


def test_b_control_sequences_reach_no_format() -> None:
    results = run_results(attacks=(HOSTILE,))
    results = replace(results, folder=results.folder / "\x1b[31mred", configuration={"note": HOSTILE})
    pictures = drawings(results)
    for text in (page(results, pictures), document(results, {HOSTILE: "x.svg"}), terminal(results)):
        assert not UNSAFE.search(text)
        assert "\\x1b[2J" in text.replace("\\\\", "\\")


def test_b_lone_surrogates_can_be_written() -> None:
    results = run_results(attacks=("\ud800",))
    for text in (page(results, drawings(results)), document(results, {}), terminal(results)):
        assert text.encode("utf-8")


class Tags(HTMLParser):
    """Elements and attributes that a browser would make."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts, self.handlers = 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.handlers += sum(name.startswith("on") for name, _ in attrs)


def test_b_markup_in_replies_names_and_settings_stays_text() -> None:
    hostile = '"><img src=x onerror=alert(1)></style></script><script>alert(1)</script>{{ 7 * 7 }}'
    results = run_results(attacks=(hostile,))
    results = replace(results, configuration={hostile: hostile}, environment={"command": [hostile]})
    tags = Tags()
    text = page(results, drawings(results))
    tags.feed(text)
    assert (tags.scripts, tags.handlers) == (1, 0)  # our own
    assert "{{ 7 * 7 }}" in text


def test_b_a_markdown_table_keeps_its_columns() -> None:
    text = document(run_results(attacks=("a|b\nc",)), {})
    rows = [line for line in text.splitlines() if line.startswith("| a")]
    assert rows and all(
        len(re.split(r"(?<!\\)\|", row)) == 8 for row in rows if "a trend, not success" in row
    )
