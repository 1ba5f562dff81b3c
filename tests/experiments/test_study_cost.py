"""What a study's dry run says of costs: measured, planned, or why neither; and both spellings of options."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.commands import study_cost
from experiments.commands.plan import PlanSettings, executed
from experiments.commands.study_cost import Costs, Planned
from experiments.config.compose import compose
from experiments.config.errors import ConfigError
from experiments.options import build_parser
from experiments.studies.scheduling import Job

Run = Callable[..., tuple[int, str, str]]
ONE_STEP = ["configs/experiment/ablation_tinychat.yaml", "configs/attack/one_step.yaml"]


def test_a_dry_run_plans_what_is_not_trained(thundercat: Run, tmp_path: Path) -> None:
    """Without loading weights: a step is 2 passes of the attack's one iteration and 4 of what is trained on
    it, and its operations are those of `thundercat plan`."""
    capo = {"config": [*ONE_STEP, "configs/objective/preference.yaml"]}
    tied = {"config": [*ONE_STEP, "configs/term/kl_retain.yaml"]}
    runs = {"cat": {"config": ONE_STEP, "seeds": [0, 1]}, "capo": capo, "tied": tied}
    columns = {"utility": {"quantity": "exact_match", "subject": "utility"}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"title": "A study", "runs": runs, "columns": columns}, sort_keys=False))
    status, said, _ = thundercat("study", str(path), "--runs", str(tmp_path / "runs"), "--dry-run")
    first, second, compared, held, left = said.splitlines()
    config = compose(ONE_STEP, [])
    flops, of_capo = (
        executed(own, PlanSettings()).cost.flops.total() for own in (config, compose(capo["config"], []))
    )
    length = config["data"]["init_args"]["encoding"]["max_length"]
    planned = f"planned: 40 steps, at most {40 * flops / 1e12:,.2f} TFLOP and {40 * 6} passes over the layers"
    assert status == 0 and flops > 1e9
    assert first.startswith("not begun     cat, seed 0  ") and first.endswith(f"  {planned}")
    assert second.startswith("not begun     cat, seed 1  ") and second.endswith(f"  {planned}")
    # What an objective compares with is scored before the first step; a term needs the copy all the time.
    assert f"  planned: 40 steps, at most {40 * of_capo / 1e12:,.2f} TFLOP" in compared
    assert "  no plan: model.base.lora: a plan cannot hold the copy of the model" in held
    assert left == (
        "left: 4 of 4 trainings; 3 of them planned, at most "
        f"{(80 * flops + 40 * of_capo) / 1e12:,.2f} TFLOP: "
        f"all rows of {length} tokens, their longest, and no attack ends by its stop_loss; "
        "4 of 4 evaluations, whose cost is in no plan"
    )
    assert not (tmp_path / "runs").exists()


def job(name: str, folder: Path, seed: int = 0, needs: tuple[tuple[str, int], ...] = (), **base: str) -> Job:
    model = {"init_args": {"base": {"name_or_path": name, **base}}}
    config = {"trainer": {"max_steps": 10}, "model": model}
    return Job(name, seed, folder / f"{name}{seed}", ("fit",), ("test",), needs, "", config)


def trained(own: Job, cost: Any) -> Job:
    own.folder.mkdir(parents=True)
    own.finish("fit")
    (own.folder / "cost.json").write_text(json.dumps(cost))
    return own


@pytest.fixture
def planned_for(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that plans were made for; an operation per step and letter of the name."""
    found: list[str] = []

    def planned(config: Mapping[str, Any]) -> Planned:
        name = config["model"]["init_args"]["base"]["name_or_path"]
        found.append(name)
        if name == "unknown":
            raise ConfigError("model: nobody\nknows it")
        return Planned(10, 10.0 * len(name), 4, 64 * len(name))

    monkeypatch.setattr(study_cost, "_planned", planned)
    return found


def test_seconds_are_of_other_seeds_else_by_the_plan_at_their_pace(
    planned_for: list[str], tmp_path: Path
) -> None:
    """Two trained seeds of a plan of 20 operations took 4 s and 6 s: 4 operations a second, so that another
    seed takes 5 s, and a plan of 80 operations 20 s."""
    jobs = [
        trained(job("ab", tmp_path, 0), {"seconds": 4.0, "passes": 1200}),
        trained(job("ab", tmp_path, 1), {"seconds": 6.0, "passes": 1200}),
        job("ab", tmp_path, 2),
        job("abcdefgh", tmp_path),
        job("unknown", tmp_path),
    ]
    costs = Costs(jobs)
    assert costs.text(jobs[0]) == "trained in 4 s, 1,200 passes of a row"
    assert costs.text(jobs[4]) == "no plan: model: nobody knows it"
    assert costs.total() == (
        "left: 3 of 5 trainings; 2 of them planned, at most 0.00 TFLOP: all rows of 128 to 512 tokens, their "
        "longest, and no attack ends by its stop_loss; 2 of them about 25 s, as those trained here; "
        "5 of 5 evaluations, whose cost is in no plan"
    )
    assert sorted(planned_for) == ["ab", "abcdefgh", "unknown"]
    jobs[2].folder.mkdir()
    assert costs.total().startswith("left: 3 of 5 trainings (begun ones counted whole: 1); ")
    assert "; 2 of them about 25 s," in costs.total()


@pytest.mark.parametrize("cost", [[], {}, {"seconds": None}, {"seconds": 0}])
def test_a_damaged_cost_is_said(cost: Any, tmp_path: Path) -> None:
    own = trained(job("ab", tmp_path), cost)
    assert Costs([own]).text(own) == "trained, its seconds are in no cost.json"
    assert Costs([own]).total().startswith("left: 0 of 1 trainings; 1 of 1 ")


def test_a_model_that_will_be_of_a_gguf_file_is_planned_by_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[Mapping[str, Any]] = []
    monkeypatch.setattr(
        study_cost, "_planned", lambda config: found.append(config) or Planned(10, 1.0, 4, 64)
    )
    first = job("first", tmp_path, gguf_file="small.gguf")
    second = job("second", tmp_path, needs=(("first", 0),), name_or_path=f"{first.folder}/model_merged")
    Costs([first, second]).text(second)
    assert found[0]["model"]["init_args"]["base"]["gguf_file"] == "small.gguf"


def test_a_model_that_another_run_will_write_has_its_architecture(
    planned_for: list[str], tmp_path: Path
) -> None:
    first = job("first", tmp_path)
    path = str(first.folder / "model_merged")
    second = job("second", tmp_path, needs=(("first", 0),), name_or_path=path)
    third = job("third", tmp_path, needs=(("second", 0),), name_or_path=f"{second.folder}/model_merged")
    Costs([first, second, third]).text(third)
    assert planned_for == ["first"]
    trained(first, {"seconds": 1.0})  # now it is there
    Costs([first, second, third]).text(third)
    assert planned_for == ["first", path]


def test_a_folder_whose_name_begins_alike_is_another(planned_for: list[str], tmp_path: Path) -> None:
    first, tenth = job("first", tmp_path, 1), job("tenth", tmp_path)
    path = f"{first.folder}0/model_merged"
    assert path.startswith(str(first.folder))
    own = job("own", tmp_path, needs=(("first", 1), ("tenth", 0)), name_or_path=path)
    Costs([first, tenth, own]).text(own)
    assert planned_for == [path]


def test_a_plan_needs_a_number_of_steps() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps: a plan expects a number of steps, got -1"):
        study_cost._planned({"trainer": {"max_steps": -1}})


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["study", "x", "--dry-run"], "dry_run", True),
        (["sweep", "x", "--report-only"], "report_only", True),
        (["sweep", "x", "--dry_run"], "dry_run", True),
        (["chat", "x", "--max-new-tokens=3"], "max_new_tokens", 3),
        (["plan", "--device_memory", "24GiB"], "device_memory", "24GiB"),
        (["fit", "--print-config"], "print_config", True),
    ],
)
def test_dashes_and_underscores_are_the_same_in_options(words: list[str], field: str, value: Any) -> None:
    """In options of ours alone: a field of the configuration is what it is called."""
    call, rest = build_parser().parse_known_args([*words, "--data.micro-batches=2"])
    assert getattr(call, field) == value and rest == ["--data.micro-batches=2"]


def test_behind_two_bare_dashes_words_are_left_as_they_are() -> None:
    call = build_parser().parse_args(["chat", "--max-new-tokens=3", "--", "--top-p"])
    assert (call.run, call.max_new_tokens) == ("--top-p", 3)
