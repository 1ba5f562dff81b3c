"""Figures: what is drawn is what was measured."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from callbacks.report.drawing import Point, save, scatter, spread, svg
from callbacks.report.figures import drawings
from tests.support.results import run_results, snapshot


def points(figure: Figure) -> set[tuple[float, float]]:
    """Where a figure's markers are."""
    return {
        (float(x), float(y))
        for container in figure.axes[0].containers
        for x, y in zip(*container.lines[0].get_data(), strict=True)
    }


def test_a_run_has_five_figures_and_a_test_of_it_no_training() -> None:
    assert list(drawings(run_results())) == ["changes", "trade_off", "attack_loss", "budget", "training"]
    assert "training" not in drawings(run_results(stage="test"))


def test_what_was_not_measured_is_not_drawn() -> None:
    bare = replace(snapshot(0, 0.5), measures={}, attacks={})
    assert drawings(replace(run_results(), snapshots=[bare], training=[])) == {}
    assert drawings(replace(run_results(), snapshots=[], training=[])) == {}


def test_an_untrained_model_alone_is_drawn_once() -> None:
    found = drawings(replace(run_results(), snapshots=[snapshot(0, 0.5)], training=[]))
    assert len(points(found["trade_off"].figure)) == 2  # direct apart, the others at one place


def test_changes_are_drawn_at_their_rates() -> None:
    found = points(drawings(run_results())["changes"].figure)
    assert {(93.75, 4.0), (6.25, 4.0), (98.0, 2.0)} <= {(round(x, 6), y) for x, y in found}


def test_curves_are_drawn_as_measured() -> None:
    results = run_results()
    (line, *_) = drawings(results)["budget"].figure.axes[0].lines
    assert list(line.get_xdata()) == [0, 10, 20, 40]
    assert list(line.get_ydata()) == [0, 20, 50, 90]
    (loss, *_) = drawings(results)["attack_loss"].figure.axes[0].lines
    assert list(loss.get_ydata()) == pytest.approx([3.0 * 0.7**i for i in range(12)])


def test_logarithmic_axes_have_plain_ticks() -> None:
    for stem in ("attack_loss", "budget"):
        assert "mathdefault" not in svg(drawings(run_results())[stem], stem)


def test_a_picture_is_one_named_well_formed_svg_of_the_pages_colour(tmp_path: Path) -> None:
    drawing = drawings(run_results())["changes"]
    text = svg(drawing, "changes")
    root = ElementTree.fromstring(text)
    assert root[0].text == drawing.title and root.get("role") == "img"
    assert "currentColor" in text and "#010203" not in text
    assert all(element.get("id", "changes-").startswith("changes-") for element in root.iter())
    alone = save(drawing, tmp_path / "changes.svg").read_text()
    ElementTree.fromstring(alone)
    assert 'style="color: #222' in alone


def test_pictures_are_the_same_every_time() -> None:
    assert svg(drawings(run_results())["budget"], "b") == svg(drawings(run_results())["budget"], "b")


def test_studies_can_draw_named_points_with_arrows() -> None:
    first, second = Point(1, 2, "cat", (0, 2), (1, 3), hollow=True), Point(4, 5, "capo")
    figure = scatter([first, second], "x", "y", arrows=[(first, second)])
    assert points(figure) == {(1.0, 2.0), (4.0, 5.0)}
    assert {"cat", "capo"} <= {text.get_text() for text in figure.axes[0].texts}


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 3)), min_size=1, max_size=8))
def test_labels_are_moved_apart_in_order(pairs: Sequence[tuple[float, int]]) -> None:
    centres, lines = [c for c, _ in sorted(pairs)], [n for _, n in sorted(pairs)]
    placed = spread(centres, lines, 5.0)
    for i in range(len(placed) - 1):
        assert placed[i + 1] - placed[i] >= 5.0 * (lines[i] + lines[i + 1]) / 2 - 1e-6


def test_labels_with_room_stay_beside_their_points() -> None:
    assert spread([0.0, 50.0, 100.0], [1, 2, 1], 5.0) == [0.0, 50.0, 100.0]
    assert spread([50.0, 50.0], [1, 1], 4.0) == [48.0, 52.0]


def test_shares_are_numbered_from_0_to_100_and_names_of_near_points_do_not_overlap() -> None:
    """Beside the points there is room for names, which no share has."""
    at = {"start": (6.0, 92.0), "tuned": (9.0, 88.0), "no attack": (7.0, 88.0), "everything": (100.0, 2.0)}
    figure = scatter([Point(x, y, name) for name, (x, y) in at.items()], "refused", "open")
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert low < -10 and high > 110  # the room
    assert [tick for tick in axes.get_xticks() if not 0 <= tick <= 100] == []
    assert len(axes.get_xticks()) >= 3
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own has its line too
    assert len(boxes) == len(at)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
