"""The search for every method's setting: what is tried, how one is chosen, and that the study has it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from datamodules.results import ResultsStore
from experiments.config.compose import compose
from experiments.studies import methods
from experiments.studies.definition import load_study
from experiments.studies.methods import RATES, VARIANTS, Search, Setting
from experiments.studies.methods_search import EMBEDDING, MEASURED, SEARCH, chosen, reached, score, searched
from tests.conftest import ROOT
from tests.support.rows import measurement, row

GOOD = dict.fromkeys(MEASURED, 0.0) | {"refuses": 1.0, "utility": 1.0}
RECORDED = ROOT / "experiments" / "results" / "methods_cpu_202611"
STUDY = "configs/study/methods_tinychat.yaml"


def finished(folder: Path, rates: Mapping[str, float], n: int = 50) -> Path:
    """A run folder with these rates on validation."""
    store = ResultsStore(folder)
    for label, metric in MEASURED.items():
        plan = measurement(
            metric.quantity, stage="fit", step=60, subject=metric.subject, attack=metric.attack, n=n
        )
        store.announce([plan])
        store.add(row(str(i), plan, i < n * rates[label]) for i in range(n))
    (folder / "cost.json").write_text(json.dumps({"steps": 60, "passes": 100.0, "seconds": 2.0}))
    (folder / "environment.json").write_text(json.dumps({"git": {"revision": "abc", "modified": False}}))
    (folder / "results.json").write_text("{}")
    return folder


def test_a_setting_that_gives_up_the_model_is_not_chosen_for_its_robustness(tmp_path: Path) -> None:
    told = {
        "lost": GOOD | {"utility": 0.4},
        "refusing": GOOD | {"over-refusal": 0.2},
        "kept": GOOD | {EMBEDDING: 0.5},
        "better": GOOD | {EMBEDDING: 0.3, "utility": 0.92},
    }
    tries = {name: reached(finished(tmp_path / name, own)) for name, own in told.items()}
    assert tries == told
    assert sorted(tries, key=lambda own: score(tries[own])) == [*told]
    assert chosen(tries) == "better"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_study_trains_what_the_search_chose(name: str, in_root: Path, tmp_path: Path) -> None:
    """And every try is a command line that composes, to a model of its own."""
    study, search = load_study(STUDY), Search(tmp_path)
    best = chosen(searched(RECORDED, VARIANTS)[name])
    run = study.runs[name]
    assert run.setting == best
    rate = Setting.of(best).rate
    tries = [*map(Setting, RATES), Setting(rate, "stronger"), Setting(rate, "tied")]
    tried = {str(own): compose(*parts(search.words(name, own))) for own in tries}
    assert len({json.dumps(own["model"]) for own in tried.values()}) == len(tries)
    places = {"${run.no defence}": "elsewhere", "${run.red team}": str(tmp_path / "red_team")}
    own = [(key, places.get(str(value), str(value))) for key, value in run.set.items()]
    trained = compose(run.config, own)
    for part in ("model", "data"):
        assert trained[part] == tried[best][part]
    assert trained["trainer"]["max_steps"] == tried[best]["trainer"]["max_steps"] == 60
    assert '"transfer"' in json.dumps(trained["trainer"]["callbacks"])


def test_the_study_has_every_method_and_asks_for_its_needs(in_root: Path) -> None:
    study = load_study(STUDY)
    assert study.reported == ["no defence", *VARIANTS] and methods.SEED not in study.seeds
    assert {label: study.columns[label].metric for label in MEASURED} == MEASURED
    needs = {name: own.needs for name, own in study.runs.items()}
    assert needs.pop("red team replay") == ["no defence", "red team"]
    assert needs.pop("no defence") == needs.pop("red team") == []
    assert {*map(tuple, needs.values())} == {("no defence",)}


def parts(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Files and overrides of a command line."""
    told = [word.removeprefix("--").partition("=")[::2] for word in words]
    return [value for key, value in told if key == "config"], [own for own in told if own[0] != "config"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[list[str]]]:
    """The command, in `tmp_path`; tries reach what `success` says of their setting and are not trained.
    Returns the command lines that were run."""

    def run(*words: str, success: Mapping[str, float] | None = None, runs: str = "runs") -> list[list[str]]:
        lines: list[list[str]] = []

        def fit(own: list[str], log: Path) -> None:
            lines.append(own)
            setting = log.parent.name.removeprefix("search_").replace("_", " ")
            if own[0] == "fit":
                finished(log.parent, GOOD | {EMBEDDING: (success or {}).get(setting, 0.5)})

        monkeypatch.setattr(methods, "_run", fit)
        fixed = ["methods", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / runs), "--workers", "1"]
        monkeypatch.setattr("sys.argv", [*fixed, *words])
        methods.main()
        return lines

    return run


def test_a_search_tries_rates_then_changes_at_the_best_and_goes_on_elsewhere(
    call: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = RATES[1]
    told = {best: 0.2, f"{best} stronger": 0.3, f"{best} tied": 0.1}
    lines = call("--methods", "cat", "--override", "data.bucket_window=2", success=told)
    tried = [*RATES, f"{best} stronger", f"{best} tied"]
    assert list(searched(tmp_path / "out", VARIANTS)["cat"]) == tried
    assert all("--data.bucket_window=2" in own and "--seed_everything=100" in own for own in lines)
    said = capsys.readouterr().out
    assert f"cat: {best} tied: --config=configs/experiment/methods_tinychat.yaml" in said
    assert f"| cat | {best} tied | 0 | 0 | 0 | 10 | 0 | 100 | 0 | 100 | 0 | 0 | chosen |" in said
    # Elsewhere nothing of these tries is there: what is recorded is not searched again.
    lines = call("--methods", "cat", "red team replay", runs="elsewhere")
    assert lines[0] == [
        *("test", "--config=configs/experiment/red_team_tinychat.yaml"),
        f"--trainer.default_root_dir={tmp_path / 'elsewhere' / 'red_team'}",
    ]
    assert len(lines) == 1 + 5
    assert all("--config=configs/method/red_team_replay.yaml" in own for own in lines[1:])
    assert [*searched(tmp_path / "out", VARIANTS)] == ["cat", "red team replay"]
    # The same again, without the record: every try is there.
    (tmp_path / "out" / SEARCH).unlink()
    assert call("--methods", "cat") == []
    with pytest.raises(SystemExit):
        call("--override", "data.bucket_window=2")
    assert "name another --out for a trial" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("cat,2e-4,,0.0", "cat,2e-4,,much", "not the record of a search .*; bring .*out back whole"),
        ("embedding 0.1", "embedding", "not the record of a search"),
        ("cat,", "kat,", "no method is called 'kat'"),
        (",yes,", ",,", "what it calls chosen is not what did best"),
        ("2e-4,,", "2e-4,yes,", "what it calls chosen is not what did best"),
        # One that did worse is gone: nothing else would tell.
        ("cat,2e-4,,0.0,0.975,0.0,0.025,1.0,1.0,0.18,0.71,0.175,0.75\n", "", "4 tries of 'cat' and 5 of "),
    ],
)
def test_a_damaged_record_is_said_in_one_line(
    old: str, new: str, said: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    whole = (RECORDED / SEARCH).read_text(encoding="utf-8")
    (tmp_path / "out").mkdir()
    assert old in whole
    (tmp_path / "out" / SEARCH).write_text(whole.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SystemExit, match=f"{SEARCH}: {said}") as caught:
        call("--methods", "cat")
    assert "\n" not in str(caught.value)
