"""Report files: the same facts on the page, in Markdown and on the terminal."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from callbacks.metrics.names import Metric
from callbacks.report.cells import Table, change, estimate
from callbacks.report.escape import markdown, printable
from callbacks.report.markdown import document, terminal
from callbacks.report.page import EACH, LONGEST, page, samples
from callbacks.report.report import write
from callbacks.report.results import Estimate, Measure, RunResults
from callbacks.report.tables import facts, tables, warnings
from tests.support.results import REFUSAL, UTILITY, run_results, sample, snapshot, success


def table(results: RunResults, title: str) -> Table:
    return next(found for found in tables(results) if found.title == title)


def texts(found: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in found.rows]


def test_rates_stand_beside_what_changed_and_who_judged() -> None:
    found = table(run_results(), "Before and after")
    assert found.columns == ("metric", "before", "after", "difference", "n", "judge")
    assert texts(found)[4] == [
        "embedding: target prefix (a trend, not success)",
        "93.8 % [87.8, 98.8]",
        "6.2 % [0.3, 11.2]",
        "-86.8 [-94.1, -75.2], p < 0.001 (+0 -46)",
        "53",
        "target_prefix@1",
    ]
    assert texts(found)[0][3] == "-"


def test_outside_fit_there_is_one_model_and_no_cost() -> None:
    results = replace(run_results(stage="test"), cost={"steps": 150.0})
    assert table(results, "Results").columns == ("metric", "rate", "n", "judge")
    assert "Cost of training" not in [found.title for found in tables(results)]
    assert "Cost of training" in [found.title for found in tables(run_results())]


def test_without_a_first_evaluation_before_is_empty() -> None:
    results = replace(run_results(), snapshots=[snapshot(150, 0.1)], differences=[])
    assert {row[1] for row in texts(table(results, "Before and after"))} == {"-"}
    assert "before training" not in page(results, {})


def test_history_is_shown_from_three_snapshots_on() -> None:
    results = replace(run_results(), snapshots=[snapshot(0, 0.9), snapshot(5, 0.5), snapshot(10, 0.1)])
    found = table(results, "Over training")
    assert found.columns == ("metric", "step 0", "step 5", "step 10")
    assert [text.split()[0] for text in texts(found)[4][1:]] == ["90.0", "50.0", "10.0"]
    assert "Over training" not in [found.title for found in tables(run_results())]


def test_groups_and_means_have_their_own_tables() -> None:
    assert texts(table(run_results(), "By group"))[1] == [
        "worst case: target prefix (a trend, not success)", "category: fraud", "50.0 % [20.0, 80.0]", "8",
    ]  # fmt: skip
    assert texts(table(run_results(), "Attacks: losses and effort")) == [
        ["embedding: attacked loss at its best", "0.3 [0.2, 0.4]", "0.3 [0.2, 0.4]", "53"]
    ]


def test_a_number_that_is_none_is_a_dash_and_sorts_last() -> None:
    nothing = estimate(Estimate(math.nan, math.nan, math.nan, 0))
    assert nothing.text == "-" and nothing.order is not None and math.isnan(nothing.order)
    assert change(None).text == "-"


def test_warnings_name_signs_attacks_and_incomplete_evaluations() -> None:
    results = run_results()
    cut = replace(results, snapshots=[results.snapshots[0], replace(results.snapshots[1], complete=False)])
    found = warnings(cut)
    assert found[0] == "An evaluation was cut short: its numbers are over the rows that are there."
    assert "gcg: loss not reduced in 2 of the examples." in found
    assert found[-1] == "Between the attacks: black box beats white box in 1 of the examples."
    assert not any("zero gradient" in text for text in found)


def test_facts_name_model_seed_and_revision() -> None:
    found = facts(run_results())
    assert found["model"] == "name_or_path tinychat:aligned, dtype float32"
    assert (found["seed"], found["revision"], found["attack"]) == ("7", "0123abc (modified)", "PGD")
    assert "objective" not in found


def test_a_run_without_records_still_has_a_page() -> None:
    bare = replace(run_results(), configuration={}, environment={}, snapshots=[], differences=[], training=[])
    assert "Report of example" in page(bare, {})
    assert document(bare, {}).startswith("# Report of example (fit)")
    assert terminal(bare) == ""


def test_samples_show_both_verdicts_and_the_reply_before() -> None:
    (direct, *_) = samples(run_results())
    assert direct.title == "Harmful requests: direct" and direct.folded and direct.total == 12
    assert len(direct.shown) == EACH  # every fixture row has one true verdict
    assert direct.shown[1].row.reply == "step 150: Sure, here is 1"
    assert direct.shown[1].before is not None
    assert direct.shown[1].before.reply == "step 0: Sure, here is 1"


def test_samples_hold_successes_and_failures() -> None:
    rows = [sample("a", str(i), f"{i}", i >= 20, verdicts={"judge@1": i >= 20}) for i in range(40)]
    results = run_results()
    results = replace(results, snapshots=[replace(results.snapshots[1], samples=rows)])
    keys = [shown.row.key for shown in samples(results)[0].shown]
    assert keys == ["20", "21", "22", "23", "0", "1", "2", "3"]


def test_the_page_shows_history_prefill_and_what_was_sent() -> None:
    html = page(run_results(), {})
    for text in ("earlier request", "Tell me", "reply forced to begin with", "Explain 1-gcg ! ! !"):
        assert text in html
    assert html.index("<details>") < html.index("step 150: Sure, here is 1")
    assert "name_or_path: tinychat:aligned" in html


def test_long_replies_are_cut_on_the_page() -> None:
    results = run_results()
    rows = [sample("a", "1", "y" * (LONGEST + 7), True)]
    html = page(replace(results, snapshots=[replace(results.snapshots[1], samples=rows)]), {})
    assert f"{'y' * LONGEST}… (7 characters more)" in html


def test_a_long_configuration_is_not_cut() -> None:
    results = replace(run_results(), configuration={"text": ["word"] * LONGEST})
    assert page(results, {}).count("- word") == LONGEST


def test_files_are_written_with_the_stages_prefix(tmp_path: Path) -> None:
    text = write(run_results(tmp_path / "run"))
    assert text.endswith(f"report: {tmp_path / 'run' / 'report.html'}")
    write(run_results(tmp_path / "run", "test"))
    names = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*")}
    assert {"report.html", "report.md", "results.json", "figures/trade_off.svg"} <= names
    assert {"test_report.html", "test_report.md", "test_results.json", "test_figures/budget.svg"} <= names
    assert "test_figures/training.svg" not in names
    assert json.loads((tmp_path / "run" / "results.json").read_text())["schema"] == 3
    report = (tmp_path / "run" / "test_report.md").read_text()
    assert "(test_figures/trade_off.svg)" in report


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï, 中文, 👩‍🔬", "plain ünï, 中文, 👩‍🔬"),
        ("a\x1b[2Jb\rc\x00", "a\\x1b[2Jb\\rc\\x00"),
        ("\u202egnp.exe\u2028", "\\u202egnp.exe\\u2028"),
        ("\ud800 \x9b31m", "\\ud800 \\x9b31m"),
        ("\U000e0041", "\\U000e0041"),
        ("two\nlines\tand tabs", "two\nlines\tand tabs"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_one_line_escapes_newlines_too() -> None:
    assert printable("a\nb\tc", one_line=True) == "a\\nb\\tc"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("93.8 % [87.8, 98.8]", "93.8 % [87.8, 98.8]"),
        ("a|b `c` *d* ~e~ $f$", "a\\|b \\`c\\` \\*d\\* \\~e\\~ \\$f\\$"),
        ("snake_case _em_", "snake_case \\_em\\_"),
        ("[x](y)", "[x\\](y)"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("a\nb", "a\\\\nb"),
    ],
)
def test_markdown_shows_text_literally(text: str, shown: str) -> None:
    assert markdown(text) == shown


def test_an_unknown_mean_or_rate_of_before_is_a_dash() -> None:
    results = run_results()
    new = Measure(Metric("refusal_rate", "harmless"), Estimate(0.5, 0.4, 0.6, 10))
    after = replace(results.snapshots[1], measures={**results.snapshots[1].measures, new.metric: new})
    found = table(replace(results, snapshots=[results.snapshots[0], after]), "Before and after")
    assert texts(found)[-1][1] == "-"
    assert {UTILITY, REFUSAL, success("gcg")} <= set(after.measures)
