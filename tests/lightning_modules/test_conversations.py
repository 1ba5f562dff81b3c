"""Conversations that begin alike: scores and gradients are those of whole rows, whatever is computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel, Qwen3MoeConfig

from datamodules.batch import UtilityBatch
from datamodules.text.encoding import utility_batch
from lightning_modules.models import conversations
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.passes import PassCounter
from lightning_modules.scoring import score_utility
from tests.conftest import SHAPE, tiny_model, utility
from tests.support.adapters import lora

COMMON = 6


def alike(size: int = 4, length: int = 14) -> UtilityBatch:
    """Conversations that begin with the same tokens, learned from the second token after them on."""
    batch = utility(size=size, length=length)
    ids, labels = batch.input_ids.clone(), batch.labels.clone()
    ids[:, :COMMON] = ids[0, :COMMON].clone()
    labels[:, : COMMON + 1] = -100
    return replace(batch, input_ids=ids, labels=labels, common=COMMON)


def scored(module: torch.nn.Module, batch: UtilityBatch) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    scores, mask = score_utility(LanguageModel(module), batch)
    (scores.sum(1) / mask.sum(1)).mean().backward()
    return scores, {name: own.grad.clone() for name, own in module.named_parameters() if own.grad is not None}


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How wide the rows are that a decoder is given."""
    seen: list[int] = []
    usual = conversations.decode

    def decode(module: Any, embeds: Tensor, *given: Any) -> Tensor:
        seen.append(embeds.shape[1])
        return usual(module, embeds, *given)

    monkeypatch.setattr(conversations, "decode", decode)
    return seen


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: lambda name=name: tiny_model(name) for name in ("llama", "gemma2", "phi3", "mistral")},
    "mixture of experts": lambda: AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(**SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        experts_implementation="eager",
    ),
}


CASES = [(family, adapted) for family in FAMILIES for adapted in (True, False)]


@pytest.mark.parametrize(("family", "adapted"), CASES[:-2] + CASES[-1:])  # no adapters on experts
def test_scores_and_gradients_are_those_of_whole_rows(family: str, adapted: bool, widths: list[int]) -> None:
    torch.manual_seed(0)
    own = FAMILIES[family]()
    model = (lora(own) if adapted else own).double().train()
    batch = alike()
    scores, gradients = scored(model, batch)
    whole, expected = scored(model, replace(batch, common=0))
    assert widths == [14 - COMMON, 14]
    torch.testing.assert_close(scores, whole, atol=1e-6, rtol=0)
    assert gradients.keys() == expected.keys()
    for name, own in gradients.items():
        # Norms and rotations are computed in fp32 whatever the weights are.
        torch.testing.assert_close(own, expected[name], atol=1e-8, rtol=1e-5, msg=name)


def test_every_row_counts_as_one_pass_either_way() -> None:
    model, batch = tiny_model().train(), alike()
    for own in (batch, replace(batch, common=0)):
        with PassCounter() as passes:
            scores, _ = score_utility(LanguageModel(model), own)
        scores.sum().backward()
        assert (passes.forward, passes.backward) == (4, 4)


def _with_dropout() -> torch.nn.Module:
    return lora(tiny_model(), lora_dropout=0.5).train()


def _recomputed() -> torch.nn.Module:
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _turned_by_length() -> torch.nn.Module:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**SHAPE | {"max_position_embeddings": 10}, rope_parameters=rope)
    )


def _dropping_by_functions() -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32)).train()


@pytest.mark.parametrize("model", [_with_dropout, _recomputed, _turned_by_length, _dropping_by_functions])
def test_rows_stay_whole_where_their_beginnings_would_differ(
    model: Callable[[], torch.nn.Module], widths: list[int]
) -> None:
    scored(model(), alike())
    assert widths == [14]


def test_dropout_that_is_off_keeps_nothing_whole(widths: list[int]) -> None:
    with torch.no_grad():
        score_utility(LanguageModel(_with_dropout().eval()), alike())
    assert widths == [14 - COMMON]


@pytest.mark.parametrize(("size", "common"), [(1, 6), (4, 4)])
def test_too_little_is_not_worth_a_pass(size: int, common: int, widths: list[int]) -> None:
    """One row shares nothing; three of four rows' four places are 12 of 56."""
    scored(tiny_model(), replace(alike(size), common=common))
    assert widths == [14]


class _Chat:
    def __init__(self, ids: list[int], learned: int) -> None:
        self.ids, self.labels = ids, [-100] * learned + ids[learned:]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([_Chat([1, 2, 3, 4, 5], 4), _Chat([1, 2, 3, 9, 9, 9], 5)], 3),
        ([_Chat([1, 2, 3, 4], 3), _Chat([1, 2, 3, 4], 3)], 2),  # the third predicts what is learned
        ([_Chat([1, 2], 0), _Chat([1, 2], 1)], 0),
        ([_Chat([7, 2, 3], 2), _Chat([8, 2, 3], 2)], 0),
        ([_Chat([1, 2, 3], 3), _Chat([1, 2, 3], 3)], 2),  # nothing is learned
    ],
)
def test_what_conversations_begin_with(rows: list[_Chat], expected: int) -> None:
    assert utility_batch(rows).common == expected
