"""Faults of the attacks that an audit found, by its numbers: each of these failed before."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import start_processes

from datamodules.fields import problem
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt
from lightning_modules.attacks.text.autodan import AutoDAN
from lightning_modules.attacks.text.choosers import FirstSuccess
from lightning_modules.attacks.text.rewrites import BestOfN
from lightning_modules.attacks.training.per_rank import gathered
from lightning_modules.models.language_model import LanguageModel
from tests.conftest import chat_model, ragged_batch, text_batch, tiny_model
from tests.support.attacks import Recording, attack_classes, persistent, suffix_generator
from tests.support.small_run import small_config
from tests.support.two_processes import ATTACKS, go_on


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two processes that went on after a checkpoint."""
    folder = tmp_path_factory.mktemp("two_processes")
    start_processes(go_on, (str(folder),), nprocs=2, start_method="fork")
    return folder


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a10_every_process_goes_on_with_its_own_state(resumed: Path, name: str, rank: int) -> None:
    whole, again = torch.load(resumed / f"{name}_{rank}.pt", weights_only=True)
    assert again["texts"] == whole["texts"]
    torch.testing.assert_close(again["loss_curve"], whole["loss_curve"], atol=0.0, rtol=0.0, equal_nan=True)


def test_a10_the_processes_states_differ(resumed: Path) -> None:
    # Otherwise the test above would also pass where every process got the first one's state.
    first, second = (torch.load(resumed / f"persistent_gcg_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first[0]["texts"] != second[0]["texts"]


def test_a10_another_number_of_processes_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    pools = [
        {"pool": {1: [3, [5]], 2: [1, [6]]}, "visits": 4},
        {"pool": {1: [2, [7]], 3: [0, [8]]}, "visits": 6},
    ]
    attack = persistent()
    attack.load_state_dict({"ranks": pools})
    assert "the checkpoint is of 2 processes, this run has 1" in caplog.text
    # Of two visits to an example the later one counts.
    assert attack.state_dict() == gathered({"pool": {1: [3, [5]], 2: [1, [6]], 3: [0, [8]]}, "visits": 6})
    generator = suffix_generator()
    generator.load_state_dict({"ranks": [{"buffer": [([1], [2])]}, {"buffer": [([3], [4])]}]})
    assert generator.state_dict()["ranks"] == [{"buffer": [[[1], [2]]]}]
    with pytest.raises(ValueError, match="expected the state of PersistentGCG in the checkpoint, got none"):
        attack.load_state_dict({"ranks": []})


@pytest.mark.parametrize("build", [EmbeddingPGD, SoftPrompt, AutoDAN])
@pytest.mark.parametrize("stop_loss", [1e9, 10.5, -0.1, float("nan"), float("inf")])
def test_a12_a_stop_loss_that_every_example_meets_is_refused(
    build: Callable[..., object], stop_loss: float
) -> None:
    with pytest.raises(ValueError, match=r"stop_loss: expected a number within \[0, 10\] or null, got"):
        build(stop_loss=stop_loss)


def _nonsense() -> list[tuple[str, str, object]]:
    """Every field of every attack that cannot be NaN, with what it must not take."""
    found: list[tuple[str, str, object]] = []
    for path, cls in attack_classes().items():
        for name, hint in typing.get_type_hints(cls.__init__, include_extras=True).items():
            if name != "return" and problem(float("nan"), hint):
                values: tuple[object, ...] = (float("nan"), float("inf"), "1", [])
                found += [(path, name, value) for value in values if problem(value, hint)]
    return found


@pytest.mark.parametrize(("path", "field", "value"), _nonsense())
def test_a12_no_field_of_an_attack_takes_nonsense(path: str, field: str, value: object) -> None:
    cls = attack_classes()[path]
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    needed = {
        # The first required plain field is LatentPGD's list of layers; other objects are not checked.
        name: "run"
        if problem([0], hints[name]) and not problem("run", hints[name])
        else [0]
        if problem(None, hints[name])
        else object()
        for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]
        if parameter.default is parameter.empty
    }
    with pytest.raises(ValueError, match=rf"{cls.__name__}\.{field}: "):
        cls(**{**needed, field: value})


def test_b_two_steps_draw_different_noise(
    thundercat: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    # A step generator with a constant seed survived all tests: every step then starts at the same point.
    Recording.noise.clear()
    recording = "--model.attack={class_path: tests.support.attacks.Recording}"
    status, _, stderr = thundercat("fit", "--config", str(small_config(tmp_path)), recording)
    assert status == 0, stderr
    assert len(Recording.noise) == 3
    assert len({tuple(noise.tolist()) for noise in Recording.noise}) == 3


def test_b_a_random_start_is_the_rng_s() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    attack = EmbeddingPGD(epsilon=0.5, num_steps=1, random_start=True, keep="last")
    first, again, other = (attack(model, batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.start_loss, again.start_loss)
    assert not torch.equal(first.start_loss, other.start_loss)


@dataclass
class Judgement:
    verdict: bool


class BatchJudge:
    """Accepts nothing, and counts."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, prompt: str, reply: str, expected: str) -> bool:
        raise AssertionError("one reply at a time")

    def judge_batch(
        self, prompts: Sequence[str], replies: Sequence[str], expected: Sequence[str]
    ) -> list[Judgement]:
        self.batches.append(len(replies))
        return [Judgement(False) for _ in replies]


def test_c7_best_of_n_is_judged_in_batches() -> None:
    judge = BatchJudge()
    attack = BestOfN(6, chooser=FirstSuccess(judge, at_once=4, max_new_tokens=2))
    attacked: Any = attack(chat_model(), text_batch(2), torch.Generator().manual_seed(0))
    assert attacked.queries.tolist() == [6, 6]
    assert len(judge.batches) == 2
    # Empty replies are not asked about.
    assert 0 < sum(judge.batches) <= 12
    assert max(judge.batches) > 2
