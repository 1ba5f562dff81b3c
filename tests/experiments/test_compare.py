"""Runs side by side: what may be compared, what is paired, what is written, and how a folder is refused."""

from __future__ import annotations

import csv
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from callbacks.judges.card import calibration
from callbacks.metrics.estimates import Estimate, paired_difference
from callbacks.metrics.names import Metric
from callbacks.metrics.pareto import front
from callbacks.report.cells import change
from callbacks.report.events import events
from callbacks.report.load import load_measured
from callbacks.report.page import study_page
from callbacks.report.results import Measure, PairedDifference, Stage
from datamodules.result_lines import Row
from experiments.commands.compare import CompareCall, compare
from experiments.commands.study import _side_by_side
from experiments.compare.columns import columns_of
from experiments.compare.comparison import warnings, write_comparison
from experiments.compare.configurations import configuration_table, differing
from experiments.compare.differences import Pairs
from experiments.compare.figures import pareto
from experiments.compare.leaderboard import Entry
from experiments.compare.runs import Run, chosen, common_stage, kept, names, read
from experiments.compare.ways import letter, ways_of, ways_table
from experiments.config.errors import ConfigError
from tests.support.compared import BROKEN, N, run_folder, run_folders, unpacked

Command = Callable[..., tuple[int, str, str]]
GCG = Metric("success_rate", "harmful", "gcg")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return run_folders(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def runs(folders: list[Path]) -> list[Run]:
    return [kept(path.name, *read(path, "fit"), path.parent) for path in folders]


@pytest.fixture(scope="module")
def written(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert compare(CompareCall([*map(str, folders)], str(out), csv=True, markdown=True)) == 0
    return out


def test_other_budgets_are_marked_and_never_paired(runs: list[Run]) -> None:
    ways = ways_of(runs)
    assert {(metric.subject, metric.attack) for metric in ways} == {("harmful", "gcg")}
    assert [*ways[GCG].values()] == ["A", "B"]
    table = ways_table(runs, ways)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["gcg: target prefix (a trend, not success)", "A", "target_prefix@1", "11", "20", "short", "a, b"],
        ["gcg: target prefix (a trend, not success)", "B", "target_prefix@1", "21", "20", "longer", "c"],
    ]
    pairs = Pairs(runs, columns_of(runs, ways, []), ways)
    place = pairs.metrics.index(GCG)
    against = pairs.against(0)
    assert [row[place].text for row in (against[0], against[2])] == ["-", "not paired: way B against A"]
    assert against[2][place].kind == "unlike"
    assert warnings(runs, ways)[0].startswith("Measured in different ways")
    assert not ways_of(runs[:2]) and warnings(runs[:2], {}) == []


def test_rows_of_two_runs_are_never_in_memory(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(own) is Row for own in gc.get_objects())

    def reading(folder: Path, stage: Stage) -> Any:
        seen.append(alive() - before)
        return read(folder, stage)

    before, seen = alive(), list[int]()
    monkeypatch.setattr("experiments.compare.comparison.read", reading)
    write_comparison([(path.name, path) for path in folders], "fit", tmp_path)
    assert seen == [0, 0, 0]


def test_differences_are_the_project_s_own(runs: list[Run], folders: list[Path]) -> None:
    outcomes = []
    for folder in folders[:2]:
        _, measured = load_measured(folder, "fit")
        outcomes.append(next(e.outcome for e in events(measured[5]) if e.metric == GCG))
    wanted = paired_difference(*outcomes)
    assert wanted is not None and (wanted.gained, wanted.lost) == (0, BROKEN["a"] - BROKEN["b"])
    pairs = Pairs(runs, columns_of(runs, ways_of(runs), []), ways_of(runs))
    cell = pairs.against(0)[1][pairs.metrics.index(GCG)]
    assert cell.text == change(PairedDifference(GCG, **vars(wanted))).text and cell.kind == "better"
    back = pairs.against(1)[0][pairs.metrics.index(GCG)]
    assert back.order == -cell.order and back.kind == "worse"


@pytest.mark.parametrize("counts", [(3, 5, 2, 10), (0, 0, 0, 4), (4, 0, 7, 0), (1, 1, 0, 0)])
def test_a_difference_has_no_direction(counts: tuple[int, int, int, int]) -> None:
    """`reversed` is what the method itself says of the pair the other way round."""
    cells = [(True, True), (False, True), (True, False), (False, False)]
    pairs = [cell for cell, count in zip(cells, counts, strict=True) for _ in range(count)]
    one, other = ({str(i): pair[side] for i, pair in enumerate(pairs)} for side in (0, 1))
    there, back = paired_difference(one, other), paired_difference(other, one)
    assert there is not None and back is not None
    assert vars(there.reversed) == pytest.approx(vars(back))


def test_only_fields_that_differ_are_listed(runs: list[Run]) -> None:
    fields = differing(runs)
    assert [(field.key, field.values) for field in fields] == [
        ("model.attack.epsilon", ["0.1", "0.2", "0.1"])
    ]
    assert configuration_table(runs, fields).columns == ("field", "a", "b", "c")
    many = configuration_table(runs * 3, differing(runs * 3))
    assert [[cell.text for cell in row] for row in many.rows] == [
        ["model.attack.epsilon", "0.1", "6", "a, c, a, c, a, c"],
        ["model.attack.epsilon", "0.2", "3", "b, b, b"],
    ]


def test_the_front_is_drawn_of_what_was_measured_alike(runs: list[Run]) -> None:
    (drawing,) = pareto(runs).values()
    # b is better than a in both; c had another budget.
    assert "on the Pareto front, in red: 2 b. Hollow: before training. 1 runs lack" in drawing.description
    assert front({"x": (1.0, 2.0), "y": (2.0, 1.0), "z": (1.0, 1.0)}, (1, 1)) == ["x", "y"]


def test_rows_are_files_that_hold_no_script(written: Path) -> None:
    data = written / "compare_data"
    index = unpacked(data / "run_000.js")
    titles = [own["title"] for own in index["sets"]]
    assert titles == ["Harmful requests", "Benign tasks", "Harmful requests: gcg"]
    rows = unpacked(data / f"{index['sets'][2]['file']}.js")
    assert len(rows) == N and rows[0]["verdicts"] == {"target_prefix@1": True}
    assert rows[3]["attacked"] == "Explain harmful 3 ! ! !"
    assert rows[3]["before"]["reply"] == "a, step 0: reply 3"
    assert "\\x1b" in rows[0]["reply"] and "</script>" in rows[0]["reply"]
    # The name and base64: nothing that a reply says is a word of the script.
    assert all(path.read_text().count('"') == 4 and "<" not in path.read_text() for path in data.iterdir())
    against = unpacked(data / "pairs_001.js")
    assert against[0][0][0].startswith("+0.0 [") and against[1][0] == ["-", None, "none"]


def test_every_row_of_a_leaderboard_has_card_and_budget(written: Path) -> None:
    with (written / "leaderboard.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert {line["run"] for line in lines} == {"a", "b", "c"}
    success = [line for line in lines if line["metric"] == "harmful/gcg/success_rate"]
    assert [(line["run"], line["way"], line["value"], line["before"]) for line in success] == [
        ("b", "A", "0.2", "0.8"),
        ("a", "A", "0.6", "0.8"),
        ("c", "B", "0.4", "0.8"),
    ]
    for line in success:
        assert (line["judge"], line["judge_version"]) == ("target_prefix", "1")
        assert (
            line["judge_card"] == calibration("target_prefix@1").text
            and line["attack_settings"] == "GCG (num_steps 10)"
        )
        assert line["passes_per_example"] == ("21.0" if line["run"] == "c" else "11.0")
        assert line["budget"].startswith("GCG (num_steps 10): ") and line["budget"].endswith("an example")
    assert all(line["budget"] for line in lines)
    refusal = next(line for line in lines if line["metric"] == "harmful/refusal_rate")
    assert refusal["budget"] == refusal["attack"] == "no attack" and refusal["judge_card"]
    text = (written / "leaderboard.md").read_text(encoding="utf-8")
    assert (
        "| GCG (num_steps 10): 11 passes, an example |" in text
        or "GCG (num_steps 10): 11 passes an example" in text
    )
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "%" in line]
    assert len(cells) == 9 and all(len(cell) == 9 and cell[5] and cell[7] for cell in cells)


def test_benign_prompts_that_carry_an_attack_tell_whose_budget_it_was(runs: list[Run]) -> None:
    def told(attack: str) -> str:
        metric = Metric("over_refusal_rate", "harmless", attack)
        return Entry(runs[0], Measure(metric, Estimate(0.0, 0.0, 1.0, 4), "keyword_refusal@3"), "").budget

    assert told("gcg") == (
        "carried, not searched for; on harmful requests GCG (num_steps 10): 11 passes an example"
    )
    assert told("gcg_towards_refusal").startswith("the same search at these; on harmful requests GCG (num")


def test_a_card_says_accuracy_or_that_there_is_none() -> None:
    known = calibration("keyword_refusal@2")
    assert known.accuracy is not None and known.text.startswith(f"{100 * known.accuracy.value:.0f} % [")
    assert known.text.endswith(f"n = {known.accuracy.n} held out")
    assert calibration("acc@1").text == "by definition"
    assert calibration("nobody@1").text == "not calibrated" and calibration("nobody@1").accuracy is None


def test_folders_and_patterns(folders: list[Path], written: Path, tmp_path: Path) -> None:
    root = folders[0].parent
    (root / "other").mkdir(exist_ok=True)  # what a pattern matches besides is no run
    assert chosen([f"{root}/*"], tmp_path) == folders
    assert chosen([str(folders[0]), f"{root}/a", f"{root}/[ab]"], tmp_path) == folders[:2]
    assert chosen([str(folders[0]), str(written)], written) == folders[:1]
    assert names([root / "x" / "seed0", root / "y" / "seed0"]) == ["x/seed0", "y/seed0"]
    assert names(folders[:1]) == ["a"]
    assert [letter(i) for i in (0, 25, 26)] == ["A", "Z", "A1"]
    assert common_stage(folders, None) == "fit"
    for words, message in (
        ([f"{root}/none*"], r"none\*: expected run folders, got none with rows/measurements.jsonl"),
        ([f"{root}/nobody"], r"nobody: expected a run folder, got none"),
    ):
        with pytest.raises(ConfigError, match=message):
            chosen(words, tmp_path)
    with pytest.raises(
        ConfigError, match=r"/a: no results of `test`, only of fit; run `thundercat test` there"
    ):
        common_stage(folders, "test")


def test_a_foreign_or_damaged_folder_is_one_line_and_changes_nothing(
    folders: list[Path], tmp_path: Path, thundercat: Command
) -> None:
    out, empty, cut = tmp_path / "out", tmp_path / "empty", tmp_path / "cut"
    empty.mkdir()
    shutil.copytree(folders[0], cut)
    place = cut / "rows" / "rows_rank0.jsonl"
    (cut / "rows" / "rows_rank0.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 no gzip")
    place.unlink()
    out.mkdir()
    (out / "compare.html").write_text("an earlier one")
    for folder, message in (
        (empty, f"{empty}: expected a run folder with results (rows/measurements.jsonl), got none"),
        (cut, f"{place}.gz: damaged ("),
    ):
        status, said, error = thundercat("compare", str(folders[1]), str(folder), "--out", str(out))
        assert status == 2 and said == "" and error.startswith(f"thundercat: {message}")
        assert error.count("\n") == 1
    assert [path.name for path in out.iterdir()] == ["compare.html"]
    assert (out / "compare.html").read_text() == "an earlier one"
    record = json.loads((folders[0] / "rows" / "rows_rank0.jsonl").read_text().splitlines()[0])
    record["verdicts"] = {"keyword_refusal@1": {}}
    (cut / "rows" / "rows_rank0.jsonl.gz").unlink()
    place.write_text(json.dumps(record) + "\n")
    with pytest.raises(ConfigError, match=rf"{cut}: damaged results \(KeyError: 'verdict'\)"):
        read(cut, "fit")


def test_the_baseline_is_one_of_the_runs(folders: list[Path], written: Path, tmp_path: Path) -> None:
    words = [*map(str, folders)]
    with pytest.raises(
        ConfigError, match="--baseline: expected one of the compared runs, got 'aa', did you mean 'a'"
    ):
        compare(CompareCall(words, str(tmp_path), baseline="aa"))
    html = (written / "compare.html").read_text(encoding="utf-8")
    assert '<option value="0" selected>a</option>' in html


def test_a_study_leads_to_the_comparison_of_its_runs(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {"cat, wide": {0: run_folder(tmp_path / "cat", "a", "test")}}
    runs["capo"] = {seed: run_folder(tmp_path / f"capo{seed}", "b", "test") for seed in (0, 1)}
    links = _side_by_side("A study", runs, tmp_path / "out")
    (text, place), *_ = links.items()
    html = (tmp_path / "out" / place).read_text(encoding="utf-8")
    assert "<title>A study: runs side by side</title>" in html
    assert all(f">{name}</option>" in html for name in ("cat, wide", "capo, seed 0", "capo, seed 1"))
    assert f'<a href="compare/compare.html">{text}</a>' in study_page("A study", [], [], {}, links)
    # Without results of `test` the study's report stands alone, and says why.
    assert _side_by_side("A study", {"a": {0: folders[0]}}, tmp_path / "none") == {}
    assert "thundercat: no comparison: " in capsys.readouterr().err
