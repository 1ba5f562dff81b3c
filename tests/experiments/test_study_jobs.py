"""A study's runs as jobs: which one comes first, what is done again, and where a stopped one goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from callbacks.run_folder.stopping import Stopped
from experiments.commands.study import Runner, StudyCall, study
from experiments.config.errors import ConfigError
from experiments.studies.definition import load_study
from experiments.studies.scheduling import Job, jobs_of
from experiments.sweeps.best import write_best
from experiments.sweeps.definition import load_sweep
from tests.support.studies import CAT, COLUMNS, given, read


def test_another_evaluation_is_asked_for_again(in_root: Path, tmp_path: Path) -> None:
    """By what its files say, not by their names; and by what the files that these name hold."""
    evaluation, prompts = tmp_path / "evaluation.yaml", tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    source = {
        "class_path": "datamodules.sources.tables.ChatTable",
        "init_args": {"path": str(prompts), "format": "lines"},
    }
    content = {"data": {"init_args": {"evaluation": {"harmless": [source]}}}}
    evaluation.write_text(yaml.safe_dump(content))

    def wanted() -> Job:
        (own,) = jobs_of(read(tmp_path, {"cat": {"config": CAT}}, test=[str(evaluation)]), tmp_path / "runs")
        return own

    first = wanted()
    first.folder.mkdir(parents=True)
    first.finish("fit")
    first.finish("test")
    assert wanted().state() == "done"
    prompts.write_text("b\n")
    assert wanted().state() == "to be judged"
    wanted().finish("test")
    content["data"]["init_args"]["evaluation"]["batch_size"] = 3  # type: ignore[assignment]
    evaluation.write_text(yaml.safe_dump(content))
    assert wanted().state() == "to be judged"


def test_a_run_is_the_same_wherever_the_folder_of_runs_lies(in_root: Path, tmp_path: Path) -> None:
    """Named absolutely or from here, it trains nothing again; which run another one starts from decides, and
    so does what a file holds, and its name, by which rows are keyed."""

    def names(runs_folder: Path, base: str = "base", text: str = "a\n", place: str = "a") -> dict[str, str]:
        data = tmp_path / place / "data.yaml"
        data.parent.mkdir(exist_ok=True)
        rows = data.with_name("prompts.txt")
        rows.write_text(text)
        source = {
            "class_path": "datamodules.sources.tables.ChatTable",
            "init_args": {"path": str(rows), "format": "lines"},
        }
        data.write_text(yaml.safe_dump({"data": {"init_args": {"utility": [source]}}}))
        runs = {
            "base": {"config": [*CAT, str(data)]},
            "other": {"config": CAT},
            "next": {"config": CAT, "set": {"model.base.name_or_path": f"${{run.{base}}}/model"}},
        }
        return {job.name: job.folder.name for job in jobs_of(read(tmp_path, runs), runs_folder)}

    first = names(tmp_path / "runs")
    assert names(Path(os.path.relpath(tmp_path / "runs"))) == first
    assert names(tmp_path / "elsewhere") == first
    for changed in (names(tmp_path / "runs", text="b\n"), names(tmp_path / "runs", place="b")):
        assert [name for name in first if changed[name] == first[name]] == ["other"]
    assert names(tmp_path / "runs", base="other")["next"] != first["next"]


def test_a_study_s_trainings_keep_their_names(in_root: Path, tmp_path: Path) -> None:
    """A field with a default that comes to a class would have every training done again, in silence: null,
    and listed in `scheduling.LATER`, it does not."""
    jobs = jobs_of(load_study("configs/study/one_step_tinychat.yaml"), tmp_path / "runs")
    names = {job.folder.name for job in jobs}
    assert names >= {"no_defence_seed0-5a93e79a05", "cat_seed0-6df6f57517", "cat_one_step_seed0-fe211b05cd"}
    fused = "model.init_args.optimizer.fused"
    runs = {name: {"config": CAT, "set": {fused: own}} for name, own in (("no", None), ("yes", True))}
    plain, null, own = (
        jobs_of(read(tmp_path, {name: run}), tmp_path / "runs")[0].digest
        for name, run in {"none": {"config": CAT}, **runs}.items()
    )
    assert plain == null != own


def test_a_training_that_ends_earlier_is_another(in_root: Path, tmp_path: Path) -> None:
    runs = {"cat": {"config": CAT}, "short": {"config": CAT, "set": {"trainer.max_time": "00:00:00:02"}}}
    one, other = jobs_of(read(tmp_path, runs), tmp_path)
    assert one.folder.name.rpartition("-")[2] != other.folder.name.rpartition("-")[2]


def test_a_run_that_is_needed_comes_first_and_its_folder_is_filled_in(in_root: Path, tmp_path: Path) -> None:
    transfer = [*CAT, "configs/evaluation/transfer.yaml"]
    runs = {
        "moved": {"config": transfer, "set": {"vars.transfer_from": "${run.base}"}, "seeds": [0, 1]},
        "base": {"config": CAT, "trained": False},
    }
    base, *moved = jobs_of(read(tmp_path, runs), tmp_path)
    assert (base.title, base.fit) == ("base, seed 0", ())
    assert "--ckpt_path=last" not in base.test
    for job in moved:
        assert f"--vars.transfer_from={base.folder}" in job.test
        assert job.needs == (("base", 0),)
        assert job.fit[-1] == "--ckpt_path=last" == job.test[-1]


def test_a_run_that_others_read_is_judged_by_its_own_files_and_not_reported(
    in_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = [CAT[0], "configs/method/red_team_replay.yaml"]
    runs = {
        "replay": {"config": method, "set": {"vars.red_team": "${run.red team}"}},
        "red team": {
            "config": ["configs/experiment/red_team_tinychat.yaml"],
            "trained": False,
            "reported": False,
        },
    }
    # An attack of its own evaluation that the red team's has not.
    columns = {"e": {"quantity": "success_rate", "subject": "harmful", "attack": "embedding"}}
    test = ["configs/data/tinychat_test.yaml"]
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"title": "A study", "runs": runs, "columns": columns, "test": test}))
    source, trained = jobs_of(load_study(path), tmp_path)
    assert (source.title, source.fit, trained.needs) == ("red team, seed 0", (), (("red team", 0),))
    assert f"--vars.red_team={source.folder}" in trained.fit
    assert [f"--config={test[0]}" in job.test for job in (source, trained)] == [False, True]
    assert study(StudyCall(str(path), runs=str(tmp_path), report_only=True)) == 1
    assert capsys.readouterr().err == "thundercat: not reported: replay (seed 0: not begun)\n"


def test_what_reads_another_run_s_rows_is_done_again_where_those_are_of_another_evaluation(
    in_root: Path, tmp_path: Path
) -> None:
    method, transfer = "configs/method/red_team_replay.yaml", "configs/evaluation/transfer.yaml"
    team = {"config": ["configs/experiment/red_team_tinychat.yaml"], "trained": False, "reported": False}
    runs = {
        "replay": {"config": [CAT[0], method], "set": {"vars.red_team": "${run.red team}"}},
        "moved": {"config": [*CAT, transfer], "set": {"vars.transfer_from": "${run.red team}"}},
        "next": {"config": CAT, "set": {"model.base.name_or_path": "${run.red team}/model"}},
    }
    changed = {"trainer.callbacks.0.init_args.attacks.gcg.init_args.num_steps": 5}
    before, after = (
        {job.name: job for job in jobs_of(read(tmp_path, {"red team": own, **runs}), tmp_path)}
        for own in (team, {**team, "set": changed})
    )
    assert before["red team"].folder == after["red team"].folder
    # Its model is as it was, its rows are others: of those that read them, one learns from them.
    assert [name for name in before if before[name].folder != after[name].folder] == ["replay"]
    judged_again = {name for name in before if before[name].judged_by != after[name].judged_by}
    assert judged_again == {"red team", "replay", "moved"}


def test_a_sweeps_best_trial_is_a_run(in_root: Path, tmp_path: Path) -> None:
    """Its file on top of the sweep's own, whatever the seed; the values are the trial's."""
    metric = {"name": "eval/harmful/embedding/success_rate"}
    columns = {**COLUMNS, "e": {"quantity": "success_rate", "subject": "harmful", "attack": "embedding"}}
    content = {"method": "random", "run_cap": 1, "metric": metric, "config": CAT, "columns": columns}
    content["parameters"] = {"vars.epsilon": {"min": 0.05, "max": 0.2}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    best = tmp_path / "best.yaml"
    write_best(load_sweep(tmp_path / "sweep.yaml"), {"vars.epsilon": 0.07}, "Trial 3", best)
    tuned = {"config": [*CAT, str(best)], "seeds": [0, 1]}
    jobs = jobs_of(read(tmp_path, {"best": tuned, "cat": {"config": CAT}}), tmp_path)
    epsilons = {job.title: job.config["model"]["init_args"]["attack"]["init_args"]["epsilon"] for job in jobs}
    assert epsilons == {"best, seed 0": 0.07, "best, seed 1": 0.07, "cat, seed 0": 0.1}
    assert all(f"--config={best}" in job.fit and f"--config={best}" in job.test for job in jobs[:2])


def test_a_stopped_study_says_how_to_go_on(
    in_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: Runner) -> dict[str, str]:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(Runner, "run", stopped)
    path = given(tmp_path / "study.yaml", {"cat": {"config": CAT}})
    assert study(StudyCall(str(path), runs=str(tmp_path))) == 143
    assert capsys.readouterr().err == "thundercat: stopped by SIGTERM; go on with the same command\n"


def test_a_study_trains_judges_and_reports(
    in_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "callbacks.evaluations.utility.UtilityEvaluation",
                    "init_args": {"schedule": {"test_limit": 4, "at_end": False}, "max_new_tokens": 4},
                }
            ]
        }
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    short = {
        "trainer.max_steps": 1,
        "data.init_args.utility_per_step": 4,
        "data.init_args.harmful_per_step": 4,
        # Encoding all rows would take longer than training.
        "data.init_args.harmful.0.init_args.num_rows": 60,
        "data.init_args.utility.0.init_args.num_rows": 60,
        "model.init_args.attack.init_args.num_steps": 1,
    }
    own = {"config": [*CAT, str(tmp_path / "suite.yaml")], "set": short}
    runs = {"base": {**own, "trained": False}, "cat": own}
    claims = [{"question": "Does a step matter?", "first": "base", "second": "cat", "columns": ["utility"]}]
    path = given(
        tmp_path / "one_step.yaml",
        runs,
        claims=claims,
        test=["configs/data/tinychat_test.yaml"],
        figures=[{"x": "utility", "y": "utility"}],
    )
    call = StudyCall(str(path), runs=str(tmp_path / "runs"))
    assert study(call) == 0
    out = tmp_path / "runs" / "one_step"
    text = (out / "report.md").read_text()
    assert "| base |" in text and "| cat |" in text
    assert "| Does a step matter? | utility | base " in text and ", p = 1.000 (4 pairs)" in text
    assert "measured in different ways" not in text
    assert (out / "cells.csv").read_text().splitlines()[1].startswith("base,utility,rate,")
    assert {own["setting"] for own in json.loads((out / "results.json").read_text())["runs"].values()} == {
        None
    }
    assert "<title>A study</title>" in (out / "report.html").read_text()
    capsys.readouterr()
    study(StudyCall(str(path), runs=str(tmp_path / "runs"), dry_run=True))
    base, cat, left = capsys.readouterr().out.splitlines()
    assert base.startswith("done ") and base.endswith("  not trained")
    assert cat.startswith("done ") and cat.endswith("  trained, its seconds are in no cost.json")
    assert left == "left: 0 of 1 trainings; 0 of 2 evaluations, whose cost is in no plan"
    # --only is obeyed by what would run, too.
    study(StudyCall(str(path), runs=str(tmp_path / "runs"), dry_run=True, only=["base"]))
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()] == ["done", "left:"]
    # What cannot be read is named, and keeps nothing else from being told.
    (cat,) = (tmp_path / "runs").glob("cat_*")
    (cat / "rows" / "measurements.jsonl").unlink()
    assert study(StudyCall(str(path), runs=str(tmp_path / "runs"), report_only=True)) == 0
    text = (out / "report.md").read_text()
    assert "## Not reported" in text and "| cat | " in text
    assert "not answered: no cat" in text
    assert "thundercat: not reported: cat (" in capsys.readouterr().err
    assert study(StudyCall(str(path), runs=str(tmp_path / "none"), report_only=True)) == 1
    with pytest.raises(ConfigError, match="--only: expected one of base, cat, got 'dog'"):
        study(StudyCall(str(path), only=["dog"]))
    with pytest.raises(ConfigError, match="--workers: expected at least 1, got 0"):
        study(StudyCall(str(path), workers=0))
    with pytest.raises(ConfigError, match="study: no file 'none.yaml'; the project's own are below"):
        study(StudyCall("none.yaml"))
