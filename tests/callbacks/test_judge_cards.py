"""Calibration cards: agreement with labels by hand, files, and the line beneath every table."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from callbacks.judges import card as cards
from callbacks.judges.base import label
from callbacks.judges.card import Card, agreement, card_path, document, kappa, line, read_card, write_card
from callbacks.judges.keyword import KeywordRefusal
from callbacks.judges.success import Success
from callbacks.metrics.names import WORST_CASE, Metric
from callbacks.report.markdown import document as markdown_report
from callbacks.report.markdown import terminal
from callbacks.report.page import page
from callbacks.report.tables import judges, tables
from tests.support.results import KEYWORD, PREFIX, run_results

VERDICTS = [True] * 20 + [True] * 5 + [False] * 10 + [False] * 15
LABELS = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15


def example(judge: str = KEYWORD) -> Card:
    own = agreement(VERDICTS, LABELS)
    return Card(
        judge, "refusals", "50 replies", own, None, {"m": own}, {"partial": own.recall}, {"x.csv": "ab"}
    )


def test_agreement_by_hand() -> None:
    """20 right yes, 5 wrong yes, 10 missed, 15 right no: accuracy 35/50, precision 20/25, recall 20/30.

    Observed agreement 0.7, expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5: kappa (0.7 - 0.5) / 0.5 = 0.4. Its simple
    standard error is sqrt(0.7 * 0.3 / 50) / 0.5 = 0.130: interval about [0.15, 0.65].
    """
    own = agreement(VERDICTS, LABELS)
    assert (own.n, own.positives) == (50, 30)
    assert [own.accuracy.value, own.precision.value, own.recall.value] == pytest.approx([0.7, 0.8, 2 / 3])
    assert (own.precision.n, own.recall.n) == (25, 30)
    assert own.kappa.value == pytest.approx(0.4)
    assert (own.kappa.low, own.kappa.high) == pytest.approx((0.146, 0.654), abs=0.04)
    assert kappa(VERDICTS, LABELS) == own.kappa  # the same resamples every time


def test_agreement_at_its_ends() -> None:
    assert (kappa([True, False], [True, False]).low, kappa([True, False], [True, False]).high) == (1.0, 1.0)
    assert kappa([True, False], [False, True]).value == -1.0
    assert math.isnan(kappa([True] * 3, [True] * 3).value)
    assert math.isnan(kappa([], []).value)
    silent = agreement([False, False], [True, False])
    assert math.isnan(silent.precision.value) and silent.recall.value == 0.0 and silent.kappa.value == 0.0


def test_cards_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = example("classifier:org/model@r1+ab")
    path = write_card(written, tmp_path)
    assert path == card_path(written.judge, tmp_path) and path.parent == tmp_path
    read = read_card(written.judge, tmp_path)
    assert read is not None and read.models.keys() == {"m"} and read.unseen is None
    assert read.overall.kappa.low == pytest.approx(written.overall.kappa.low, abs=1e-6)
    assert document(read) == path.with_suffix("").with_name(f"{path.stem}.md").read_text(encoding="utf-8")
    assert "| m | 50 | 30 | 70 % [56, 81] | 80 % [61, 91] | 67 % [49, 81] | 0.40 [0.1" in document(read)


def test_a_number_that_is_none_survives(tmp_path: Path) -> None:
    silent = replace(example(), overall=agreement([False], [False]))
    write_card(silent, tmp_path)
    read = read_card(silent.judge, tmp_path)
    assert read is not None and math.isnan(read.overall.precision.value)
    assert "precision -, kappa -" in line(silent.judge, tmp_path)


def test_a_damaged_card_is_named(tmp_path: Path) -> None:
    card_path(KEYWORD, tmp_path).write_text("{}", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"keyword_refusal@1\.json: damaged .*run `python -m experiments.judges`"
    ):
        read_card(KEYWORD, tmp_path)


def test_the_line_says_what_was_held_out_or_that_there_is_no_card(tmp_path: Path) -> None:
    assert line(KEYWORD, tmp_path) == f"{KEYWORD}: not calibrated"
    assert (
        line(PREFIX, tmp_path)
        == f"{PREFIX}: a target prefix alone is called a trend, not success; not calibrated"
    )
    write_card(example(), tmp_path)
    assert line(KEYWORD, tmp_path).startswith(
        f"{KEYWORD}: recall 67 % [49, 81], precision 80 % [61, 91], kappa 0.40"
    )
    assert line(KEYWORD, tmp_path).endswith("n = 50, 50 replies, cards/keyword_refusal@1.json")
    write_card(replace(example(), unseen=agreement([True, False], [True, False])), tmp_path)
    assert "n = 2 held out" in line(KEYWORD, tmp_path)


def test_every_report_prints_a_line_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run_results()
    found = judges(results)
    assert f"{KEYWORD}: not calibrated" in found and len(found) == len({own.split(":")[0] for own in found})
    for text in (page(results, {}), markdown_report(results, {}).replace("\\", ""), terminal(results)):
        assert f"{KEYWORD}: not calibrated" in text
        assert text.count("a target prefix alone is called a trend, not success") == 1


def test_a_target_prefix_is_titled_a_trend_in_every_table() -> None:
    trend = "gcg: target prefix (a trend, not success)"
    own = Metric("success_rate", "harmful", "gcg")
    assert own.titled("target_prefix@1") == own.titled("success@1 or target_prefix@1") == trend
    assert own.titled("success@1") == own.title == "gcg: attack success"
    # Only what it decides is called so.
    assert Metric("not_refused_rate", "harmful", "gcg").titled("target_prefix@1") == "gcg: not refused"
    cells = [row[0].text for table in tables(run_results()) for row in table.rows]
    assert f"{WORST_CASE.replace('_', ' ')}: target prefix (a trend, not success)" in cells
    assert not any("attack success" in cell for cell in cells)


@pytest.mark.parametrize("judge", [KeywordRefusal(), Success()])
def test_the_packaged_cards_are_those_of_the_judges_as_they_are(judge: KeywordRefusal | Success) -> None:
    assert read_card(label(judge)) is not None, f"run `python -m experiments.judges`: {label(judge)} changed"
    stored = {path.stem for path in cards.CARDS.glob("*.json")}
    assert {path.stem for path in cards.CARDS.glob("*.md")} == stored
