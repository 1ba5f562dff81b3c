"""The benchmark's two sides compute the same thing, on rows small enough for a test."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from experiments import benchmark
from experiments.benchmark import Ours, Public, agree, interleaved
from experiments.benchmark_data import equal_rows
from tests.conftest import VOCABULARY, ragged_batch, tiny_model, utility


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_reference_and_ours_agree_on_ragged_rows(family: str) -> None:
    model = get_peft_model(tiny_model(family), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    ours, public = Ours(model, ragged_batch(), utility()), Public(model, ragged_batch(), utility(), 24)
    agreement = agree(ours, public, ours.attack(), public.attack())
    assert agreement["relative_loss_difference"] <= 1e-5
    assert agreement["equal_coordinates"] >= 0.99


def test_a_different_perturbation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    ours, public = Ours(model, ragged_batch(), utility()), Public(model, ragged_batch(), utility(), 24)
    attack = benchmark.reference.attack
    monkeypatch.setattr(benchmark.reference, "attack", lambda *arguments: 0.5 * attack(*arguments))
    with pytest.raises(AssertionError, match="the two sides"):
        agree(ours, public, ours.attack(), public.attack())


def test_equal_rows_have_no_padding() -> None:
    batch, conversations = equal_rows(VOCABULARY, prompt=30, reply=4)
    assert batch.validate().prompt_mask.all()
    assert conversations.attention_mask.all()


def test_calls_are_interleaved() -> None:
    order: list[str] = []
    seconds, results = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b") or 3}, 2)
    assert order == ["a", "b", "a", "b"]
    assert results == {"a": None, "b": 3}
    assert [len(values) for values in seconds.values()] == [2, 2]
