"""The benchmark's two sides compute the same thing, on rows small enough for a test."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from experiments.benchmarks import training_step as benchmark
from experiments.benchmarks.rows import equal_rows
from experiments.benchmarks.training_step import Ours, Public, interleaved, losses_agree, perturbations_agree
from tests.conftest import VOCABULARY, ragged_batch, tiny_model, utility


def sides(family: str = "llama") -> tuple[Ours, Public]:
    model = get_peft_model(
        tiny_model(family), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    batches = [utility(), utility()]
    return Ours(model, ragged_batch(), batches), Public(model, ragged_batch(), batches, 24)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_reference_and_ours_agree_on_ragged_rows(family: str) -> None:
    ours, public = sides(family)
    mine, theirs = ours.step(), public.step()
    losses_agree(mine.loss, theirs.loss)
    perturbations_agree(ours.adversarial, mine.perturbation, theirs.perturbation)
    assert all(parameter.grad is None for parameter in public.model.parameters())


def test_a_different_perturbation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, public = sides()
    attack = benchmark.training_yardstick.attack
    monkeypatch.setattr(benchmark.training_yardstick, "attack", lambda *arguments: 0.5 * attack(*arguments))
    mine, theirs = ours.step(), public.step()
    with pytest.raises(AssertionError, match="find different perturbations"):
        perturbations_agree(ours.adversarial, mine.perturbation, theirs.perturbation)
    with pytest.raises(AssertionError, match="compute different losses"):
        losses_agree(mine.loss, mine.loss + 0.1)


def test_equal_rows_have_no_padding() -> None:
    batch, conversations = equal_rows(VOCABULARY, prompt=30, reply=4)
    assert batch.validate().prompt_mask.all()
    assert conversations[0].attention_mask.all()


def test_calls_are_interleaved() -> None:
    order: list[str] = []
    seconds, results = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b") or 3}, 2)
    assert order == ["a", "b", "a", "b"]
    assert results == {"a": None, "b": 3}
    assert [len(values) for values in seconds.values()] == [2, 2]
