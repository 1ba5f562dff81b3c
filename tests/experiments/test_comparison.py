"""Finished runs side by side: how seeds become intervals, and questions are answered."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from callbacks.report.load import load
from callbacks.report.markdown import table_text
from datamodules.results import ResultsStore
from experiments.studies.answers import answers
from experiments.studies.archive import archive, archived
from experiments.studies.comparison import Compared
from experiments.studies.comparison import read as compared
from experiments.studies.definition import Claim, Column, Study, load_study
from experiments.studies.study_report import cells, replies, write_study
from tests.conftest import ROOT
from tests.support.rows import measurement, row

METHODS = load_study(ROOT / "configs" / "study" / "methods_tinychat.yaml")
NO_DEFENCE, EMBEDDING, ADAPTIVE = "no defence", "embedding 0.1", "adaptive GCG"
RATES = {label: own for label, own in METHODS.columns.items() if own.quantity != "loss_best"}
UNDER_ATTACK = ("prefilling", "embedding", "soft prompt", "adaptive")
GOOD = {"refuses": 1.0, "utility": 1.0} | {f"utility, {attack}": 1.0 for attack in UNDER_ATTACK}


def finished(
    folder: Path, stage: str, rates: Mapping[str, float], n: int = 50, passes: float = 100.0, steps: int = 60
) -> Path:
    """A run folder with every rate as told, else 0."""
    store = ResultsStore(folder)
    for label, column in RATES.items():
        metric = column.metric
        of = {"stage": stage, "step": 60, "subject": metric.subject, "attack": metric.attack, "n": n}
        plan = measurement(metric.quantity, **of)  # type: ignore[arg-type]
        store.announce([plan])
        store.add(row(str(i), plan, i < n * rates.get(label, 0.0)) for i in range(n))
    (folder / "cost.json").write_text(json.dumps({"steps": steps, "passes": passes, "seconds": 2.0}))
    facts = {"git": {"revision": "abc", "modified": folder.name.endswith("1")}}
    (folder / f"{stage}_environment.json").write_text(json.dumps(facts))
    return folder


def runs(folder: Path, *further: float) -> dict[str, dict[int, Path]]:
    """CAT is robust to one attack and not to the other, and one of its seeds differs; R2D2 does nothing.

    Args:
        further: rates of further seeds of CAT.
    """
    told: dict[str, list[dict[str, float]]] = {
        NO_DEFENCE: [{EMBEDDING: 1.0, ADAPTIVE: 1.0}],
        "cat": [{ADAPTIVE: 1.0, EMBEDDING: own} for own in (0.0, 0.4, *further)],
        "r2d2": [{EMBEDDING: 1.0, ADAPTIVE: 1.0}, {EMBEDDING: 1.0, ADAPTIVE: 1.0}],
    }
    return {
        name: {
            seed: finished(folder / f"{name}_{seed}", "test", GOOD | own) for seed, own in enumerate(by_seed)
        }
        for name, by_seed in told.items()
    }


def comparison(names: Iterable[str], seeds: Iterable[int] = (0, 1)) -> Study:
    """The shipped comparison of methods: its rates, of some of its runs."""
    own = {name: METHODS.runs[name] for name in names}
    asked = {"claims": METHODS.claims, "figures": METHODS.figures[:1]}
    return Study(METHODS.title, own, RATES, METHODS.about, [*seeds], **asked)  # type: ignore[arg-type]


def read(folders: Mapping[str, Mapping[int, Path]]) -> dict[str, Compared]:
    return compared(folders, RATES)


def table(rows: Mapping[str, Compared]) -> str:
    return table_text(cells(comparison(rows), rows))


def claims(rows: Mapping[str, Compared]) -> str:
    study = comparison(rows)
    return table_text(replies(study, answers(rows, METHODS.claims, RATES, study.untrained), rows))


def test_seeds_become_one_rate_with_its_interval_and_both_seeds_are_shown(tmp_path: Path) -> None:
    rows = read(runs(tmp_path))
    rate = rows["cat"].rates[EMBEDDING]
    assert (rate.value, rate.by_seed, rate.num_examples) == (0.2, (0.0, 0.4), 50)
    assert rate.low < 0.05 and rate.high > 0.35
    assert "(0, 40)" in table(rows)
    assert table(rows).splitlines()[2].startswith("| no defence | 0 [0, 7] |")


def test_who_judged_and_who_refuses_what_carries_an_attack_stand_beneath_the_tables(tmp_path: Path) -> None:
    clean = {"over-refusal": 0.0, "utility": 1.0, "benign refused, adaptive": 0.0, "utility, adaptive": 1.0}
    told = {
        0: clean | {"benign refused, embedding": 0.2, "utility, embedding": 1.0},
        1: clean | {"benign refused, embedding": 0.18, "utility, embedding": 0.8},
        2: clean | {"benign refused, embedding": 0.18, "utility, embedding": 0.82},
    }
    folders = {"cat": {s: finished(tmp_path / str(s), "test", GOOD | own) for s, own in told.items()}}
    rows = read(folders)
    assert rows["cat"].carrying == {"embedding": 2}
    text = write_study(comparison(["cat"], [0, 1, 2]), folders, tmp_path / "out")
    for written in (text, (tmp_path / "out" / "report.html").read_text()):
        assert written.count("cat: embedding (2 of 3)") == 1
        assert written.count("target prefix alone is called a trend, not success; not calibrated") == 1


def test_seeds_that_were_judged_on_other_examples_are_not_one_rate(tmp_path: Path) -> None:
    """What they shared had been counted, and the rest left out in silence."""
    by_seed = {seed: tmp_path / str(seed) for seed in (0, 1)}
    for seed, folder in by_seed.items():
        store, plan = ResultsStore(folder), measurement(stage="test", n=2 + seed)
        store.announce([plan])
        store.add([row(str(i), plan, True) for i in range(2 + seed)])
    column = Column("success_rate", "harmful", "gcg")
    with pytest.raises(ValueError, match=r"cat: 'x' was judged on other examples in some .* \(2, 3\)"):
        compared({"cat": by_seed}, {"x": column})


def test_claims_are_differences_with_what_could_have_been_seen(tmp_path: Path) -> None:
    lines = claims(read(runs(tmp_path, 0.2))).splitlines()
    robust = next(line for line in lines if line.startswith(f"| CAT makes the model robust | {EMBEDDING}"))
    assert "| no defence 100 % | cat 20 % | -80 [" in robust
    assert "(50 pairs) | lower |" in robust
    same = next(line for line in lines if line.startswith(f"| CAT makes the model robust | {ADAPTIVE}"))
    # 50 of 50 against 50 of 50 is no proof that they are alike within five points.
    assert "| +0 [-7, +7] (50 pairs) | not distinguishable |" in same
    assert "points |" in same
    # A question whose runs are not there is told as such.
    assert {line.split(" | ")[5] for line in lines if "CAPO" in line} >= {"not answered: no capo"}
    assert all("| not answered: no " in line for line in lines if "CAPO" in line)


def told(folder: Path, outcome: list[bool], settings: str = "s", first: int = 0) -> dict[int, Path]:
    """A run with one seed and one rate."""
    plan = measurement("exact_match", stage="test", step=60, subject="utility", n=len(outcome))
    plan.settings = settings
    store = ResultsStore(folder)
    store.announce([plan])
    store.add(row(str(first + i), plan, yes) for i, yes in enumerate(outcome))
    return {0: folder}


UTILITY = {"utility": Column("exact_match", "utility")}


def test_one_seed_each_is_compared_pair_by_pair_where_the_examples_are_the_same(tmp_path: Path) -> None:
    rows = compared(
        {
            "a": told(tmp_path / "a", [True] * 30 + [False] * 10),
            "b": told(tmp_path / "b", [True] * 40),
            "others": told(tmp_path / "c", [True] * 40, first=36),
            "otherwise": told(tmp_path / "d", [True] * 40, settings="longer replies"),
        },
        UTILITY,
    )
    claims = [Claim("q", "a", other, ["utility"]) for other in ("b", "others", "otherwise")]
    paired, apart, unlike = answers(rows, claims, UTILITY)
    assert paired.paired is not None and (paired.paired.n, paired.paired.gained) == (40, 10)
    assert paired.difference.low > 0 and paired.measured_alike
    half = max(paired.difference.high - 0.25, 0.25 - paired.difference.low)
    assert paired.difference.detectable == pytest.approx(half * (1.959964 + 0.841621) / 1.959964, rel=1e-5)
    # Four shared examples of forty are not told as the difference of the two rates.
    assert apart.paired is None and apart.difference.value == pytest.approx(0.25)
    assert not unlike.measured_alike
    # Two trainings say nothing of others; a model as it is has no others, and against itself nothing is one.
    assert paired.single and "higher; one training each" in table_text(
        replies(comparison(["cat"]), [paired], rows)
    )
    fixed = [own.single for own in answers(rows, claims, UTILITY, ["a", "b"])]
    assert fixed == [False, True, True]


def test_no_difference_is_told_where_the_exact_test_tells_none(tmp_path: Path) -> None:
    """5 of 39 lost, none gained: Newcombe's interval is below 0, McNemar's p is 0.0625."""
    before, after = [True] * 5 + [False] * 34, [False] * 39
    rows = compared({"a": told(tmp_path / "a", before), "b": told(tmp_path / "b", after)}, UTILITY)
    (found,) = answers(rows, [Claim("q", "a", "b", ["utility"])], UTILITY)
    assert found.paired is not None and found.paired.p_value == 0.0625
    assert found.difference.verdict(0.05) == "lower" and found.says(0.05) == "not distinguishable"
    told_apart = told(tmp_path / "c", [True] * 6 + [False] * 33)
    rows = compared({"a": told_apart, "b": told(tmp_path / "d", after)}, UTILITY)
    assert answers(rows, [Claim("q", "a", "b", ["utility"])], UTILITY)[0].says(0.05) == "lower"


def test_a_perplexity_is_a_column(tmp_path: Path) -> None:
    def scored(folder: Path, *nats: float) -> Path:
        plan = measurement("token_perplexity", stage="test", step=60, subject="utility", n=3, block="text")
        plan.judge = "sliding_window@context=8,stride=4"
        store = ResultsStore(folder)
        store.announce([plan])
        counts = {"tokens": 4, "words": 2, "bytes": 8}
        store.add(
            plan.row(f"w{i}", "", "", verdicts={plan.judge: {"verdict": None, "score": own}}, counts=counts)
            for i, own in enumerate(nats)
        )
        return folder

    columns = {"per word": Column("word_perplexity", "utility", block="text")}
    runs = {"a": {0: scored(tmp_path / "a", 2.0, 4.0, 6.0)}, "b": {0: scored(tmp_path / "b", 2.2, 4.2, 6.2)}}
    rows = compared(runs, columns)
    # 12 nats on the 6 words of all windows.
    assert rows["a"].means["per word"].value == pytest.approx(math.e**2)
    # Every window is 0.2 nats worse: the pairs say so, though each run's own interval is wide.
    (answer,) = answers(rows, [Claim("?", "a", "b", ["per word"])], columns)
    assert answer.difference.value == pytest.approx(math.e**2.1 - math.e**2)
    assert answer.difference.low > 0
    assert rows["a"].means["per word"].high > rows["b"].means["per word"].low
    # A second seed that is as much worse again: Student's of two seeds beside the windows' chance.
    runs["b"][1] = scored(tmp_path / "c", 2.4, 4.4, 6.4)
    (wider,) = answers(compared(runs, columns), [Claim("?", "a", "b", ["per word"])], columns)
    assert wider.difference.value == pytest.approx((math.e**2.1 + math.e**2.2) / 2 - math.e**2)
    assert wider.pairs == 3
    # Two seeds half a unit and more apart tell nothing of a third.
    assert wider.difference.low < 0 < answer.difference.low
    runs["b"][1] = scored(tmp_path / "d", 2.2, 4.2, 6.2)
    (alike,) = answers(compared(runs, columns), [Claim("?", "a", "b", ["per word"])], columns)
    assert alike.difference.value == pytest.approx(answer.difference.value)
    assert alike.difference.high - alike.difference.low < 0.6 * (wider.difference.high - wider.difference.low)


def test_names_that_an_earlier_archive_had_are_gone(tmp_path: Path) -> None:
    out, old = tmp_path / "out", finished(tmp_path / "old", "test", GOOD, passes=5000.0)
    archive({"cat": {0: old, 1: old}}, out)
    new = finished(tmp_path / "new", "test", GOOD)
    (new / "cost.json").unlink()
    # What a comparison of the copies needs to say in which fields they differ.
    (new / "test_config.yaml").write_text("seed_everything: 3\n")
    (copy,) = archive({"cat": {0: new}}, out)["cat"].values()
    assert load(copy, "test").configuration == {"seed_everything": 3}
    assert not (copy / "cost.json").exists()
    # A seed that is not among today's would be told by --recorded.
    assert archived(out, ["cat"]) == {"cat": {0: copy}}
    archive({"cat": {2: old, 10: old}}, out)
    assert [*archived(out, ["cat"])["cat"]] == [2, 10]  # by number, as they were trained


def test_what_collecting_the_data_took_is_part_of_the_cost(tmp_path: Path) -> None:
    folder = finished(tmp_path / "cat_0", "test", GOOD, passes=100.0)
    cost = json.loads((folder / "cost.json").read_text())
    (folder / "cost.json").write_text(json.dumps(cost | {"collecting_passes": 11}))
    assert read({"cat": {0: folder}})["cat"].passes == 111


def test_report_and_figure_are_written(tmp_path: Path) -> None:
    out, study = tmp_path / "out", comparison([*runs(tmp_path)])
    text = write_study(study, runs(tmp_path), out)
    assert "| cat | 1.5e-3 stronger |" in text and "| no defence |  |" not in text
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "cells.csv",
        "environment.json",
        "figure_0.svg",
        "report.html",
        "report.md",
        "results.json",
        "runs",
        "tables.csv",
    ]
    # Everybody can compute the tables again from what lies beside them.
    again = read(archived(out, study.runs))
    assert table(again) in text and claims(again) in text
    facts = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert facts["revisions_of_runs"] == ["abc", "abc modified"]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["runs"]["cat"]["setting"] == "1.5e-3 stronger"
    assert content["runs"][NO_DEFENCE]["setting"] is None
    with pytest.raises(ValueError, match="expected finished runs, got none"):
        write_study(study, {}, tmp_path / "none")
    with pytest.raises(ValueError, match=r"no results of `test`"):
        read({"cat": {0: tmp_path / "nothing"}})
    with pytest.raises(ValueError, match=r"no 'direct' \(harmful/direct/success_rate\) .* test it again"):
        store, plan = ResultsStore(tmp_path / "few"), measurement(stage="test")
        store.announce([plan])
        store.add([row("0", plan, True)])
        read({"cat": {0: tmp_path / "few"}})
