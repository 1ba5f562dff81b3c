"""How a hostile reader broke the safety of runs, each way as it was watched: numbers of two models or of two
settings in one table, stale rows, a linked run folder."""

from __future__ import annotations

import enum
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from callbacks.evaluations.probe import Probe
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.judges.exact import ExactMatch
from callbacks.metrics.names import WORST_CASE, Metric
from callbacks.report.load import export, load
from callbacks.report.report import write_report
from callbacks.report.tables import rates
from callbacks.run_folder.checkpoints import RunCheckpoints
from callbacks.run_folder.decisive import LOADING, ORDER, decisive, differences
from callbacks.run_folder.folder import RunFolder
from datamodules.result_lines import Measurement
from datamodules.results import ResultsStore
from datamodules.settings import describe, settings_digest
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.text.encoding import Encoder, EncodingConfig, evaluation_batch
from lightning_modules.attacks.text.rewrites import Templates
from tests.conftest import chat_model, tinychat_format
from tests.support.rows import measurement, row, verdicts

GCG, DIRECT = Metric("success_rate", "harmful", "gcg"), Metric("success_rate", "harmful", "direct")


def store(folder: Path, *plans: Measurement, verdict: bool = False) -> None:
    """One command that measures these."""
    own = ResultsStore(folder)
    own.announce(plans)
    own.add(row(of=plan, verdict=verdict) for plan in plans)


# --- models


def test_a_second_model_in_a_folder_has_a_report_of_its_own(tmp_path: Path) -> None:
    first = measurement(stage="test", model="first")
    second = measurement(stage="test", model="second", attack="direct")
    store(tmp_path, first, replace(first, attack="direct"), verdict=True)
    store(tmp_path, second)
    found = load(tmp_path, "test").after
    assert found is not None and found.model == "second"
    assert {own.attack for own in found.measures} == {"direct"}
    assert found.measures[DIRECT].estimate.value == 0
    # Back to the first model: nothing is attacked again, and its numbers are shown.
    ResultsStore(tmp_path).announce([first, replace(first, attack="direct")])
    found = load(tmp_path, "test").after
    assert found is not None and found.model == "first"
    assert {own.attack for own in found.measures} == {"direct", "gcg", WORST_CASE}
    assert all(own.estimate.value == 1 for own in found.measures.values() if own.estimate.kind == "rate")


def test_a_report_is_of_the_checkpoint_that_was_tested_last(tmp_path: Path) -> None:
    late, early = (measurement(stage="test", step=s, model=f"m{s}") for s in (4, 0))
    store(tmp_path, late, verdict=True)
    store(tmp_path, early)
    for expected, again in ((0, early), (4, late), (0, early)):
        ResultsStore(tmp_path).announce([again])
        found = load(tmp_path, "test")
        assert found.after is not None and found.after.step == expected
        assert found.after.measures[GCG].estimate.value == (expected == 4)
        shown = export(found)["after"]
        assert shown["step"] == expected


@pytest.mark.parametrize("base", ["m0", "another"])
def test_a_test_is_compared_with_the_model_that_its_run_began_from_alone(tmp_path: Path, base: str) -> None:
    store(tmp_path, measurement(stage="fit", step=0, model="m0"), verdict=True)
    store(tmp_path, measurement(stage="test", step=0, model=base), verdict=True)
    store(tmp_path, measurement(stage="test", step=4, model="m4"))
    found = load(tmp_path, "test")
    assert found.after is not None and found.after.step == 4
    if base == "m0":
        assert found.before is not None and found.before.measures[GCG].estimate.value == 1
        assert [own.metric for own in found.differences if own.metric == GCG] == [GCG]
        assert rates(found).title == "Before and after"
    else:
        assert found.before is None and not found.differences
        assert rates(found).title == "Results"


def test_a_test_on_other_rows_is_not_filled_up_with_an_earlier_one_s(tmp_path: Path) -> None:
    whole = [measurement(stage="test"), measurement(stage="test", attack="direct")]
    store(tmp_path, *whole, verdict=True)
    found = load(tmp_path, "test").after
    assert found is not None and {GCG, DIRECT} <= set(found.measures)
    # Later the same checkpoint, by one of the two alone: the other's number is of other rows, or may be.
    store(tmp_path, replace(whole[1], settings="other rows"))
    found = load(tmp_path, "test").after
    assert found is not None and {own.attack for own in found.measures} == {"direct"}
    assert found.measures[DIRECT].estimate.value == 0


# --- settings


@pytest.mark.parametrize("change", [{"settings": "wider"}, {"judge": "keyword_refusal@1"}])
def test_what_was_measured_in_another_way_is_not_compared(tmp_path: Path, change: dict[str, str]) -> None:
    direct, gcg = measurement(attack="direct"), measurement()
    store(tmp_path, direct, gcg, verdict=True)
    later = [replace(own, step=4, model="trained") for own in (direct, gcg)]
    store(tmp_path, later[0], replace(later[1], **change))
    found = load(tmp_path)
    assert found.before is not None and found.after is not None
    worst = replace(GCG, attack=WORST_CASE)
    # What was measured alike is compared; the other attack, and what it is part of, is not.
    assert DIRECT in found.before.measures and {GCG, worst}.isdisjoint(found.before.measures)
    assert [own.metric for own in found.differences] == [DIRECT]
    assert {GCG, worst} <= set(found.after.measures)
    assert set(found.before.attacks) == ({"direct"} if "settings" in change else {"direct", "gcg"})
    assert {own.attack for own in found.before.samples} == {"direct"}
    shown = write_report(tmp_path)
    titles = [found.after.measures[metric].title for metric in (GCG, worst)]
    assert f"not compared: {', '.join(titles)}" in shown
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith(f"| {titles[0]}")).split(" | ")[1] == "-"


def test_equal_settings_are_compared(tmp_path: Path) -> None:
    store(tmp_path, measurement(), verdict=True)
    store(tmp_path, replace(measurement(), step=4, model="trained"))
    found = load(tmp_path)
    assert [own.difference for own in found.differences] == [-1]
    assert not found.set_aside and "not compared" not in write_report(tmp_path)


# --- what decides a row


def test_a_changed_templates_file_is_another_attack(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("First {prompt}\n", encoding="utf-8")
    attack = Templates(str(file))
    before = settings_digest(attack)
    assert settings_digest(attack) == before
    file.write_text("Second {prompt}\n", encoding="utf-8")
    assert settings_digest(attack) != before


class Side(enum.Enum):
    LEFT, RIGHT = 1, 2


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Path("a"), Path("b")),
        ({"a"}, {"b"}),
        (torch.tensor([1]), torch.tensor([2])),
        (Side.LEFT, Side.RIGHT),
        (verdicts, measurement),
        (GCG, DIRECT),
    ],
)
def test_values_of_any_kind_tell_settings_apart(a: object, b: object) -> None:
    assert describe(a) != describe(b)
    assert describe({"a", "b"}) == describe({"b", "a"})


class Data:
    """One held-out request."""

    examples = {"harmful": [None]}
    blocks: ClassVar[dict[str, Any]] = {}

    def rows_of(self, subject: str, block: str) -> list[Any]:
        return [None]

    def loader(
        self, subject: str, limit: int | None, rank: int, world_size: int, block: str, against: str
    ) -> list[Any]:
        encoder = Encoder(tinychat_format(), EncodingConfig(max_length=160))
        return [evaluation_batch(encoder.harmful(TinyChatHarmful("validation", limit=1).rows()), "user")]


class Suite:
    """The request itself."""

    name, schedule, max_new_tokens, seed = "refusal", Schedule(), 4, 0

    def probes(self) -> list[Probe]:
        return [Probe("harmful", "refusal_rate", ExactMatch())]


def test_another_precision_does_not_take_over_rows(tmp_path: Path) -> None:
    def settings(precision: str) -> str:
        place = Place(chat_model(), tmp_path, "test", 0, precision=precision)
        return Session(place, Data(), [Suite()]).jobs[0].measurement.settings  # type: ignore[arg-type]

    assert settings("32-true") == settings("32-true") != settings("bf16-mixed")


# --- run folder


def test_overwrite_behind_a_link_moves_the_run_and_keeps_the_link(tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "run", tmp_path / "run"
    target.mkdir(parents=True)
    (target / "config.yaml").write_text("a: 1\n")
    link.symlink_to(target)
    assert RunFolder.of(link).move_aside() == tmp_path / "disk" / "run.1"
    assert link.is_symlink() and link.is_dir() and not list(link.iterdir())
    assert (tmp_path / "disk" / "run.1" / "config.yaml").read_text() == "a: 1\n"


@pytest.mark.parametrize(
    ("field", "whole", "fewer"), [("overfit_batches", 0.0, 2), ("limit_train_batches", 1.0, 1)]
)
def test_fewer_training_rows_are_another_run(field: str, whole: float, fewer: int) -> None:
    unset, then, now = (decisive({"trainer": own}) for own in ({}, {field: whole}, {field: fewer}))
    assert unset == then  # a run that was begun before the field was looked at goes on
    assert differences(then, now) == [f"trainer.{field}: (unset) then, {fewer} now"]


def test_checkpoints_beyond_the_resumed_step_are_set_aside(tmp_path: Path) -> None:
    """`last` after a resume from an older checkpoint was the newest file of the branch that was left."""

    class Beginning:
        is_global_zero, fast_dev_run, global_step, default_root_dir = True, False, 2, str(tmp_path)

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1, 2, 4):
        (folder / f"step_{step:06d}.ckpt").write_bytes(b"")
    RunCheckpoints().on_train_start(Beginning(), None)  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_000001.ckpt",
        "step_000002.ckpt",
        "step_000004.aside",
    ]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_of_several_micro_batches_does_not_go_on_with_other_rows(parts: int) -> None:
    """Before, they decided which rows a step holds; a run begun then would have gone on in silence."""
    data = {"class_path": "datamodules.adversarial.AdversarialData", "init_args": {"micro_batches": parts}}
    now = decisive({"seed_everything": 0, "data": data})
    begun = {key: value for key, value in now.items() if key != ORDER}
    assert differences(now, now) == []
    assert [text.split(":")[0] for text in differences(begun, now)] == ([ORDER] if parts > 1 else [])


def test_an_evaluation_may_merge_adapters_its_own_way_and_a_training_may_not() -> None:
    """How attacks compute with the weights is not what the weights are; a rank is."""
    model = "lightning_modules.adversarial.AdversarialFineTuning"
    then, merged, other = (
        decisive({"model": {"class_path": model, "init_args": {"base": {"lora": lora}}}})
        for lora in ({"r": 4}, {"r": 4, "merge": "rounded"}, {"r": 8})
    )
    assert differences(then, merged, LOADING) == []
    assert [text.split(":")[0] for text in differences(then, merged)] == ["model.base.lora.merge"]
    assert [text.split(":")[0] for text in differences(then, other, LOADING)] == ["model.base.lora.r"]
