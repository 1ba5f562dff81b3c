"""Studies: what their YAML may say, and which runs it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.commands.study import Runner, StudyCall, study
from experiments.commands.study_cost import Costs
from experiments.config.errors import ConfigError
from experiments.studies.definition import load_study
from experiments.studies.scheduling import jobs_of
from tests.support.studies import CAT, given, read


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


def test_runs_may_be_those_of_another_study(tmp_path: Path) -> None:
    first = given(tmp_path / "first.yaml", {"a": {"config": CAT, "seeds": [3]}})
    content = yaml.safe_load(first.read_text(encoding="utf-8"))
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump({**content, "title": "Another", "runs": first.name}), encoding="utf-8")
    assert load_study(second).runs == load_study(first).runs and load_study(second).title == "Another"
    second.write_text(yaml.safe_dump({**content, "runs": "gone.yaml"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"second\.yaml: runs: no file 'gone\.yaml'"):
        load_study(second)


def test_a_study_of_another_s_runs_has_its_seeds_and_tells_its_mistakes_as_its_own(tmp_path: Path) -> None:
    first = given(tmp_path / "first.yaml", {"a": {"config": CAT}})
    content = yaml.safe_load(first.read_text(encoding="utf-8"))
    first.write_text(yaml.safe_dump({**content, "seeds": [4, 5]}), encoding="utf-8")
    own = {key: value for key, value in content.items() if key != "seeds"} | {"runs": first.name}
    second, third = tmp_path / "second.yaml", tmp_path / "third.yaml"
    second.write_text(yaml.safe_dump(own), encoding="utf-8")
    assert load_study(second).seeds == [4, 5]
    third.write_text(yaml.safe_dump({**own, "seeds": [6]}), encoding="utf-8")
    assert load_study(third).seeds == [6]
    third.write_text(yaml.safe_dump({**own, "runs": second.name}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"third\.yaml: runs: second\.yaml has none .*name first\.yaml"):
        load_study(third)
    first.write_text(yaml.safe_dump({**content, "runs": {"a": {"confg": CAT}}}), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"second\.yaml: runs: .*first\.yaml: runs\.a\.confg: unknown field"
    ):
        load_study(second)
