"""Studies: what their YAML may say, which runs it names, and that a study goes on where it was ended."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks.run_folder.stopping import Stopped
from experiments.commands.study import Runner, StudyCall, study
from experiments.commands.study_cost import Costs
from experiments.config.errors import ConfigError
from experiments.studies.definition import Study, load_study
from experiments.studies.scheduling import Job, jobs_of
from experiments.sweeps.best import write_best
from experiments.sweeps.definition import load_sweep

CAT = ["configs/experiment/methods_tinychat.yaml", "configs/method/cat.yaml"]
COLUMNS = {"utility": {"quantity": "exact_match", "subject": "utility"}}


def given(path: Path, runs: dict[str, Any], **more: Any) -> Path:
    path.write_text(yaml.safe_dump({"title": "A study", "runs": runs, "columns": COLUMNS, **more}))
    return path


def read(path: Path, runs: dict[str, Any], **more: Any) -> Study:
    return load_study(given(path / "study.yaml", runs, **more))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"runs": {}}, "runs: expected names with fields, got {}"),
        ({"runs": {"a": {"config": []}}}, "runs.a.config: expected at least one file, got none"),
        ({"runs": {"a": {"confg": CAT}}}, "runs.a.confg: unknown field, did you mean 'config'?"),
        ({"runs": {"a": {"set": {}}}}, "runs.a.config: expected at least one file, got none"),
        ({"runs": {"a": {"config": CAT, "reported": False}}}, "runs: expected at least one that is reported"),
        ({"runs": {"a": {"config": CAT, "seeds": []}}}, "runs.a.seeds: expected at least one seed"),
        ({"runs": {"a": {"config": CAT, "seeds": [-1]}}}, "runs.a.seeds: item 0: expected an integer >= 0"),
        (
            {"runs": {"a": {"config": CAT, "set": {"x": "${run.b}"}}}},
            "runs.a.set: expected one of a, got 'b'",
        ),
        (
            {"runs": {"a": {"config": CAT, "set": {"x": "${run.a}/model"}}}},
            "runs.a.set: the run needs itself",
        ),
        (
            {"columns": {"u": {"quantity": "exact_mach", "subject": "utility"}}},
            "columns.u.quantity: expected one of .* got 'exact_mach', did you mean 'exact_match'",
        ),
        (
            {"claims": [{"question": "q", "first": "a", "second": "c", "columns": ["utility"]}]},
            "claims.0.second: expected one of a, got 'c'",
        ),
        (
            {
                "runs": {"a": {"config": CAT}, "b": {"config": CAT, "trained": False, "reported": False}},
                "claims": [{"question": "q", "first": "b", "second": "a", "columns": ["utility"]}],
            },
            "claims.0.first: expected one of a, got 'b'",
        ),
        (
            {"figures": [{"x": "utility", "y": "robust"}]},
            "figures.0.y: expected one of utility, got 'robust'",
        ),
        (
            {"runs": {"a": {"config": CAT, "paper": {"second": 3.2}}}},
            "runs.a.paper: expected one of forward, backward, passes, seconds, got 'second', did you mean",
        ),
        ({"runs": {"a": {"config": CAT, "paper": {"passes": 0}}}}, "runs.a.paper: .*expected a number > 0"),
        ({"margin": 0}, "margin: expected a number within"),
        ({"margin": 5}, "margin: expected a number within"),
        ({"seeds": [0, 0]}, "runs.a.seeds: expected different seeds"),
        ({"runs": {"a": {"config": CAT, "set": {"ckpt_path": "x"}}}}, "runs.a.set.ckpt_path: .* by itself"),
        ({"runs": {"a": {"config": CAT, "set": {"seed_everything": 7}}}}, "seed_everything: .* use `seeds`"),
        (
            {"runs": {"a, b": {"config": CAT}, "a_b": {"config": CAT, "set": {"trainer.max_steps": 1}}}},
            "runs: 'a, b' and 'a_b' would share a folder; rename one of them",
        ),
        (
            {"claims": [{"question": "q", "first": "a", "second": "a", "columns": ["utility"]}]},
            "claims.0.second: expected another run than `first`",
        ),
        (
            {
                "runs": {"a": {"config": CAT}, "b": {"config": CAT, "seeds": [1]}},
                "claims": [{"question": "q", "first": "a", "second": "b", "columns": []}],
            },
            "claims.0.columns: expected at least one column, got none",
        ),
        ({"runs": {"a": {"config": CAT, "step": 5}}}, "runs.a: expected checkpoint_of and step together"),
        (
            {"runs": {"a": {"checkpoint_of": "b", "step": 5}}},
            "runs.a.checkpoint_of: expected one of a, got 'b'",
        ),
        (
            {
                "runs": {
                    "a": {"config": CAT, "trained": False},
                    "b": {"checkpoint_of": "a", "step": 5},
                }
            },
            "runs.b.checkpoint_of: expected a run that is trained, got 'a'",
        ),
        *(
            (
                {"runs": {"a": {"config": CAT}, "b": {"checkpoint_of": "a", "step": 5, name: value}}},
                f"runs.b.{name}: a checkpoint is judged by what trained it, 'a'; leave the field out",
            )
            for name, value in (("config", CAT), ("set", {"vars.epsilon": 0.2}), ("trained", False))
        ),
        (
            {
                "seeds": [0, 1],
                "runs": {
                    "a": {"config": CAT, "seeds": [1]},
                    "b": {"checkpoint_of": "a", "step": 5, "seeds": [0, 1, 2]},
                },
            },
            r"runs.b.seeds: 'a' has no checkpoints of the seeds 0, 2, only of 1; leave them out, or add them",
        ),
        ({"seeds": 3}, "seeds: expected a list of .* got 3"),
        ({"titel": "x"}, "titel: unknown field, did you mean 'title'"),
    ],
)
def test_what_a_study_may_not_say_is_told_in_one_line(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, **{"runs": {"a": {"config": CAT}}, **change})
    assert "study.yaml: " in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_is_named_by_what_decides_its_weights(in_root: Path, tmp_path: Path) -> None:
    runs = {
        "base": {"config": CAT, "trained": False},
        "cat": {"config": CAT, "seeds": [0, 1]},
        "evaluated otherwise": {"config": CAT, "set": {"vars.adaptive_steps": 3}, "seeds": [2]},
        "longer": {"config": CAT, "set": {"trainer.max_steps": 61}},
    }
    first = {job.title: job for job in jobs_of(read(tmp_path, runs), tmp_path)}
    assert len({job.folder for job in first.values()}) == 5
    assert first["cat, seed 1"].folder.name.startswith("cat_seed1-")
    # The same run under another name, in another study, is where the first one put it.
    first["cat, seed 0"].folder.mkdir()
    other = {"again": {"config": CAT}, "wider": {"config": CAT, "set": {"vars.epsilon": 0.2}}}
    second = {job.title: job for job in jobs_of(read(tmp_path, other), tmp_path)}
    assert second["again, seed 0"].folder == first["cat, seed 0"].folder
    assert second["wider, seed 0"].folder != first["cat, seed 0"].folder


def test_two_names_of_one_training_are_refused_before_any_run(in_root: Path, tmp_path: Path) -> None:
    """Whether a folder of it is there already, as where a kill ended the study, or none."""
    kept = {"trainer.max_steps": 10, "vars.checkpoint_steps": 5}
    cat, early = {"config": CAT, "set": kept}, {"checkpoint_of": "cat", "step": 5}
    said = "runs: 'one, seed 0' and 'two, seed 0' are the same training; leave one of them out"
    for runs in ({"one": cat, "two": cat}, {"cat": cat, "one": early, "two": early}):
        alone = {name: own for name, own in runs.items() if name != "two"}
        for _ in range(2):
            with pytest.raises(ConfigError, match=said):
                jobs_of(read(tmp_path, runs), tmp_path / "runs")
            jobs_of(read(tmp_path, alone), tmp_path / "runs")[-1].folder.mkdir(parents=True, exist_ok=True)


def test_a_checkpoint_of_another_run_is_judged_in_a_folder_of_its_own(in_root: Path, tmp_path: Path) -> None:
    kept = {"trainer.max_steps": 12, "vars.checkpoint_steps": 5, "vars.checkpoint_keep": 3}
    kept |= {"model.base.name_or_path": "${run.base}/model"}
    early = {"checkpoint_of": "cat", "step": 5}
    runs = {"early": early, "cat": {"config": CAT, "set": kept, "seeds": [0, 1]}}
    runs["base"] = {"config": CAT, "trained": False}
    base, *jobs = jobs_of(read(tmp_path, runs), tmp_path)
    by_title = {job.title: job for job in jobs}
    # Behind its training, and of all its seeds.
    assert [*by_title] == ["cat, seed 0", "cat, seed 1", "early, seed 0", "early, seed 1"]
    own, of = by_title["early, seed 1"], by_title["cat, seed 1"]
    assert (own.fit, own.needs, own.state()) == ((), (("cat", 1),), "to be judged")
    assert of.keeps == (5, 10, 12)
    assert own.test[-1] == f"--ckpt_path={of.folder}/checkpoints/step_000005.ckpt"
    assert own.folder != of.folder and f"--trainer.default_root_dir={own.folder}" in own.test
    # By its training's own configuration, down to the folders of others that it names.
    assert own.test[1:-2] == of.fit[1:-2]  # all but the folder and the checkpoint
    assert f"--model.base.name_or_path={base.folder}/model" in own.test
    # Of another training, or another step, it is another one.
    runs["cat"] = {"config": CAT, "set": kept, "seeds": [1]}
    wider = {"config": CAT, "set": kept | {"vars.epsilon": 0.2}, "seeds": [1]}
    for changed in ({"early": {**early, "step": 10}}, {"cat": wider}):
        assert jobs_of(read(tmp_path, runs | changed), tmp_path)[-1].folder != own.folder
    with pytest.raises(ConfigError, match=r"runs.early: step: 'cat' leaves .* steps 5, 10, 12, got 7; set"):
        jobs_of(read(tmp_path, {**runs, "early": {**early, "step": 7}}), tmp_path)
    with pytest.raises(ConfigError, match=r"runs.early: step: 12 is the end of 'cat', .* told twice; leave"):
        jobs_of(read(tmp_path, {**runs, "early": {**early, "step": 12}}), tmp_path)


def test_a_checkpoint_that_its_training_did_not_keep_is_told_before_any_run(
    in_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training is the same whichever checkpoints it keeps: this one was done for a study that kept two."""
    kept = {"trainer.max_steps": 12, "vars.checkpoint_steps": 5, "vars.checkpoint_keep": 3}
    runs = {"cat": {"config": CAT, "set": kept}, "early": {"checkpoint_of": "cat", "step": 5}}
    call = StudyCall(str(given(tmp_path / "study.yaml", runs)), runs=str(tmp_path / "runs"))
    cat, early = jobs_of(load_study(call.study), tmp_path / "runs")
    later = cat.folder / "checkpoints" / "step_000010.ckpt"
    later.parent.mkdir(parents=True)
    monkeypatch.setattr(Runner, "run", lambda self: {})
    monkeypatch.setattr(Costs, "_plan", lambda self, job: "")
    said = (
        f"runs.early.step: 'cat, seed 0' is past that step, and .*/step_000005.ckpt is .* move {cat.folder} "
    )
    assert study(replace(call, dry_run=True)) == 0  # it may be on its way there
    listed = [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed[:2] == ["begun", "waits for cat"]
    for note in (later.touch, lambda: (later.unlink(), cat.finish("fit"))):
        note()
        for own in (call, replace(call, dry_run=True)):
            with pytest.raises(ConfigError, match=said):
                study(own)
    # What needs it not, and what is judged, goes on without it; and what is there is reported.
    assert study(replace(call, report_only=True)) == study(replace(call, only=["cat"])) == 1
    assert "not reported: early (seed 0: to be judged)" in capsys.readouterr().err
    early.folder.mkdir()
    early.finish("test")
    assert study(replace(call, dry_run=True)) == 0


def test_an_impossible_run_fails_before_the_first(in_root: Path, tmp_path: Path) -> None:
    runs = {"good": {"config": CAT}, "bad": {"config": CAT, "set": {"model.attack.epslion": 0.1}}}
    with pytest.raises(ConfigError, match=r"runs\.bad: model\.attack\.epslion: unknown field"):
        jobs_of(read(tmp_path, runs), tmp_path)
    with pytest.raises(ConfigError, match=r"runs\.good: .*no file 'configs/data/none.yaml'"):
        jobs_of(read(tmp_path, {"good": runs["good"]}, test=["configs/data/none.yaml"]), tmp_path)


def test_a_doubled_name_is_said(tmp_path: Path) -> None:
    path = given(tmp_path / "study.yaml", {"a": {"config": CAT}})
    path.write_text(path.read_text().replace("runs:\n", "runs:\n  a: {config: [x.yaml]}\n"))
    with pytest.raises(ConfigError, match=r"study\.yaml:\d+: .*'a'"):
        load_study(path)


def test_a_column_that_no_evaluation_measures_fails_before_the_training(
    in_root: Path, tmp_path: Path
) -> None:
    columns = {"e": {"quantity": "success_rate", "subject": "harmful", "attack": "embeding"}}
    with pytest.raises(ConfigError, match=r"columns\.e\.attack: 'embeding' .* did you mean 'embedding"):
        jobs_of(read(tmp_path, {"cat": {"config": CAT}}, columns=columns), tmp_path)
    columns["e"]["optional"] = True  # type: ignore[assignment]
    assert jobs_of(read(tmp_path, {"cat": {"config": CAT}}, columns=columns), tmp_path)


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
