"""The comparison of training methods: what is run, how a setting is chosen, how seeds become intervals."""

from __future__ import annotations

import json
import lzma
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from callbacks.metrics.names import Metric
from callbacks.report.markdown import table_text
from datamodules.results import ResultsStore
from experiments.config.compose import compose
from experiments.studies import methods
from experiments.studies.archive import archive, archived
from experiments.studies.comparison import Compared, answers
from experiments.studies.comparison import read as compared
from experiments.studies.definition import Claim, Column
from experiments.studies.methods import RATES as LEARNING_RATES
from experiments.studies.methods import VARIANTS, Setting, Study
from experiments.studies.methods_search import (
    ADAPTIVE,
    CLAIMS,
    EMBEDDING,
    NO_DEFENCE,
    OPTIONAL,
    RATES,
    comparison,
    search_table,
    validation_score,
)
from experiments.studies.study_report import cells, replies, write_study
from tests.support.rows import measurement, row

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


def runs(folder: Path) -> dict[str, dict[int, Path]]:
    """CAT is robust to one attack and not to the other, and one of its seeds differs; R2D2 does nothing."""
    told: dict[str, list[dict[str, float]]] = {
        NO_DEFENCE: [{EMBEDDING: 1.0, ADAPTIVE: 1.0}],
        "cat": [{ADAPTIVE: 1.0}, {ADAPTIVE: 1.0, EMBEDDING: 0.4}],
        "r2d2": [{EMBEDDING: 1.0, ADAPTIVE: 1.0}, {EMBEDDING: 1.0, ADAPTIVE: 1.0}],
    }
    return {
        name: {
            seed: finished(folder / f"{name}_{seed}", "test", GOOD | own) for seed, own in enumerate(by_seed)
        }
        for name, by_seed in told.items()
    }


def read(folders: Mapping[str, Mapping[int, Path]]) -> dict[str, Compared]:
    return compared(folders, RATES, OPTIONAL)


def table(rows: Mapping[str, Compared]) -> str:
    return table_text(cells(comparison([*rows], [0, 1], {}), rows))


def claims(rows: Mapping[str, Compared]) -> str:
    study = comparison([*rows], [0, 1], {})
    return table_text(replies(study, answers(rows, CLAIMS, RATES), rows))


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
    text = write_study(comparison(["cat"], [0, 1, 2], {}), folders, tmp_path / "out", OPTIONAL)
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
    lines = claims(read(runs(tmp_path))).splitlines()
    robust = next(line for line in lines if line.startswith(f"| CAT makes the model robust | {EMBEDDING}"))
    assert "| no defence 100 % | cat 20 % | -80 [" in robust
    assert "| lower |" in robust
    same = next(line for line in lines if line.startswith(f"| CAT makes the model robust | {ADAPTIVE}"))
    # 50 of 50 against 50 of 50 is no proof that they are alike within five points.
    assert "| +0 [-7, +7] | not distinguishable |" in same
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


def test_names_that_an_earlier_archive_had_are_gone(tmp_path: Path) -> None:
    out, old = tmp_path / "out", finished(tmp_path / "old", "test", GOOD, passes=5000.0)
    archive({"cat": {0: old}}, out)
    new = finished(tmp_path / "new", "test", GOOD)
    (new / "cost.json").unlink()
    (copy,) = archive({"cat": {0: new}}, out)["cat"].values()
    assert not (copy / "cost.json").exists()


def test_a_setting_that_gives_up_the_model_is_not_chosen_for_its_robustness(tmp_path: Path) -> None:
    kept = finished(tmp_path / "kept", "fit", GOOD | {EMBEDDING: 0.5})
    better = finished(tmp_path / "better", "fit", GOOD | {EMBEDDING: 0.3, "utility": 0.92})
    lost = finished(tmp_path / "lost", "fit", GOOD | {"utility": 0.4})
    refusing = finished(tmp_path / "refusing", "fit", GOOD | {"over-refusal": 0.2})
    order = sorted([lost, refusing, kept, better], key=validation_score)
    assert [path.name for path in order] == ["lost", "refusing", "kept", "better"]
    found = search_table({"cat": {"1e-4": kept, "1e-3": better}}, {"cat": "1e-3"})
    assert found["cat"]["chosen"] == "1e-3"
    assert found["cat"]["1e-4"][EMBEDDING] == 0.5


def test_what_collecting_the_data_took_is_part_of_the_cost(tmp_path: Path) -> None:
    folder = finished(tmp_path / "cat_0", "test", GOOD, passes=100.0)
    cost = json.loads((folder / "cost.json").read_text())
    (folder / "cost.json").write_text(json.dumps(cost | {"collecting_passes": 11}))
    assert read({"cat": {0: folder}})["cat"].passes == 111


def test_report_and_figure_are_written(tmp_path: Path) -> None:
    chosen, out = {"cat": "6e-4"}, tmp_path / "out"
    study = comparison([*runs(tmp_path)], [0, 1], chosen)
    text = write_study(study, runs(tmp_path), out, OPTIONAL, chosen)
    assert "cat 6e-4" in text
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "cells.csv",
        "environment.json",
        "figure_0.svg",
        "figure_1.svg",
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
    assert content["runs"]["cat"]["setting"] == "6e-4"
    with pytest.raises(ValueError, match="expected finished runs, got none"):
        write_study(study, {}, tmp_path / "none")
    with pytest.raises(ValueError, match=r"no results of `test`"):
        read({"cat": {0: tmp_path / "nothing"}})
    with pytest.raises(ValueError, match=r"no 'direct' \(harmful/direct/success_rate\) .* test it again"):
        store, plan = ResultsStore(tmp_path / "few"), measurement(stage="test")
        store.announce([plan])
        store.add([row("0", plan, True)])
        read({"cat": {0: tmp_path / "few"}})


@pytest.mark.parametrize("name", [NO_DEFENCE, *VARIANTS])
def test_every_run_is_a_command_line_that_composes(
    name: str, in_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(methods, "_run", lambda words, log: calls.append(list(words)))
    tries = [*map(Setting, LEARNING_RATES), Setting("6e-4", "stronger"), Setting("6e-4", "tied")]
    monkeypatch.setattr(Study, "chosen", lambda self, own: tries[4])
    study = Study(tmp_path, 7, (0, 1), ("--data.bucket_window=2",))
    search = [] if name == NO_DEFENCE else study.search(name, tries)
    for job in (*search, *study.final(name)):
        job()
    # Five tries, then a training and a test for each seed; without a defence there is a test alone.
    assert len(calls) == (1 if name == NO_DEFENCE else 5 + 2 * 2)
    configs = [compose(*parts(words[4:])) for words in calls]
    models = [json.dumps(config["model"]) for config in configs]
    # Every try is another, and what is judged is the one that was chosen.
    assert len({*models[:5]}) == len(models[:5])
    assert {*models[5:]} <= {models[-1]} and (name == NO_DEFENCE or models[-1] == models[4])
    for words, config in zip(calls, configs, strict=True):
        assert config["trainer"]["max_steps"] == 7
        test_rows = "split: test" in json.dumps(config["data"]).replace('"', "")
        assert test_rows == (words[3] == "test")
        if name != NO_DEFENCE:
            assert config["model"]["init_args"]["optimizer"]["lr"] == float(
                words_of(parts(words[4:])[1])["lr"]
            )


def test_a_choice_that_changes_does_not_take_over_what_was_judged(tmp_path: Path) -> None:
    study = Study(tmp_path, 7, (0,))
    told = dict(zip(LEARNING_RATES, (0.5, 0.2, 0.6), strict=True))
    assert study.finished("cat") is None
    for rate, success in told.items():
        finished(study.searched("cat", Setting(rate)), "fit", GOOD | {EMBEDDING: success})
        (study.searched("cat", Setting(rate)) / "results.json").write_text("{}")
    best = LEARNING_RATES[1]
    assert study.tries("cat")[3:] == [Setting(best, "stronger"), Setting(best, "tied")]
    assert study.finished("cat") is None
    for change, success in (("stronger", 0.3), ("tied", 0.1)):
        folder = study.searched("cat", Setting(best, change))  # type: ignore[arg-type]
        finished(folder, "fit", GOOD | {EMBEDDING: success})
        (folder / "results.json").write_text("{}")
    assert str(study.chosen("cat")) == f"{best} tied"
    old = study.folder("cat", f"seed0_{best}")
    old.mkdir(parents=True)
    (old / "test_results.json").write_text("{}")
    assert study.finished("cat") is None
    (judged,) = study.judged("cat").values()
    judged.mkdir(parents=True)
    (judged / "test_results.json").write_text("{}")
    assert study.finished("cat") == {0: judged}


def test_what_is_recorded_is_neither_trained_nor_judged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another machine goes on with the methods that a comparison's folder lacks."""
    out, runs = tmp_path / "out", tmp_path / "runs"

    def call(where: Path, *words: str) -> None:
        fixed = ["methods", "--out", str(out), "--runs", str(where), "--seeds", "0", "--steps", "7"]
        monkeypatch.setattr("sys.argv", [*fixed, *words])
        methods.main()

    def made(where: Path, name: str) -> None:
        study = Study(where, 7, (0,))
        for rate in LEARNING_RATES:
            for own in (Setting(rate), Setting(rate, "stronger"), Setting(rate, "tied")):
                finished(study.searched(name, own), "fit", GOOD)
                (study.searched(name, own) / "results.json").write_text("{}")
        judge(study.judged(name)[0])

    def judge(folder: Path) -> None:
        finished(folder, "test", dict.fromkeys(RATES, 0.5), steps=7)
        (folder / "test_results.json").write_text("{}")

    judge(Study(runs, 7, (0,)).judged(NO_DEFENCE)[0])
    made(runs, "cat")
    call(runs, "--methods", "cat", "--report_only")
    first = {path: path.read_bytes() for path in out.rglob("*.xz")}
    # Elsewhere: nothing of the first machine's runs is there.
    jobs: list[str] = []
    monkeypatch.setattr(methods, "work", lambda own, workers, title: jobs.append(title))
    made(tmp_path / "elsewhere", "capo")
    call(tmp_path / "elsewhere", "--methods", "cat", "capo")
    assert {own.partition(":")[0] for own in jobs} == {"capo"}
    report = (out / "report.md").read_text()
    assert all(f"| {name} |" in report for name in (NO_DEFENCE, "cat", "capo"))
    assert list(json.loads((out / "search.json").read_text())) == ["cat", "capo"]
    assert {path: path.read_bytes() for path in first} == first
    with pytest.raises(SystemExit, match=r"out: cat has \{7\} steps, expected 8; name another --out"):
        call(runs, "--steps", "8")
    refuses_what_is_not_whole(out, call, runs)
    with pytest.raises(SystemExit):
        call(runs, "--override", "data.bucket_window=2")
    assert "name another --out for a trial" in capsys.readouterr().err


def refuses_what_is_not_whole(out: Path, call: Any, runs: Path) -> None:
    """In one line that names the remedy, whatever of a recorded comparison is missing or damaged."""
    cat = out / "runs" / "cat" / "seed0"
    rows = cat / "rows" / "rows_rank0.jsonl.xz"
    lines = lzma.decompress(rows.read_bytes()).splitlines(keepends=True)
    results = json.loads((out / "results.json").read_text())
    search = json.loads((out / "search.json").read_text())
    renamed = {("kat" if name == "cat" else name): own for name, own in results["runs"].items()}
    shutil.copytree(out / "runs" / "cat", out / "runs" / "kat")
    cases: list[tuple[Path, bytes | None, str]] = [
        (cat / "cost.json", None, r"cost.json: missing; bring .*out back whole .* or name another --out"),
        (cat / "cost.json", b"{}", "cost.json: no number of steps in it; bring"),
        (out / "search.json", None, "search.json: missing beside results.json; bring"),
        (
            out / "search.json",
            json.dumps({"capo": search["capo"]}).encode(),
            "nothing of cat, which results.json has",
        ),
        (out / "search.json", b'{"cat": ', "search.json: not JSON"),
        (out / "results.json", b'{"runs"', "results.json: not the results of a comparison"),
        (out / "results.json", b"{}", "results.json: not the results of a comparison"),
        (out / "results.json", json.dumps({"runs": renamed}).encode(), "no method is called 'kat'; bring"),
        (
            out / "results.json",
            json.dumps({"runs": {"r2d2": 0}}).encode(),
            "r2d2 is in results.json, and its",
        ),
        (rows, lzma.compress(b"".join(lines[:-1])), "49 of 50 replies of .*; test it again"),
        (rows, None, "0 of 50 replies of .*; test it again"),
    ]
    for path, content, said in cases:
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(SystemExit, match=said) as caught:
            call(runs, "--methods", "cat", "--report_only")
        assert "\n" not in str(caught.value)
        path.write_bytes(before)
    shutil.rmtree(out / "runs" / "kat")


def parts(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    files, overrides = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--config":
            files.append(rest.pop(0))
        elif word.startswith("--config="):
            files.append(word.partition("=")[2])
        else:
            key, _, value = word[2:].partition("=")
            overrides.append((key, value))
    return files, overrides


def words_of(overrides: list[tuple[str, str]]) -> dict[str, Any]:
    return {key.rpartition(".")[2]: value for key, value in overrides}


def test_names_of_rates_are_measured_by_the_suite(in_root: Path) -> None:
    config = compose(
        [methods.BASE, "configs/method/cat.yaml", methods.TRANSFER], [("vars.transfer_from", "x")]
    )
    suites = [
        own for own in config["trainer"]["callbacks"] if own["class_path"].endswith("RobustnessEvaluation")
    ]
    attacks = {name for own in suites for name in own["init_args"]["attacks"]}
    assert {column.attack for column in RATES.values() if column.attack} <= attacks
    assert Metric("success_rate", "harmful", "transfer") in [column.metric for column in RATES.values()]
