"""Beginnings that are computed once: where they would not be what the whole row has, they are not used, or it
is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt
from lightning_modules.models import packed
from lightning_modules.models.cached_scoring import continued_log_probs, prefix_cache
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.packed import PackedRows
from lightning_modules.models.reply import Reply
from tests.conftest import SHAPE, VOCABULARY, ragged_batch, tiny_model


def model_of(config: PreTrainedConfig) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval())


def rows_of(model: LanguageModel, fixed: int, size: int = 2) -> PackedRows:
    batch = ragged_batch(size=size, prompt=20)
    reply = Reply(batch.harmful_ids, batch.harmful_mask)
    lengths = batch.prompt_mask.sum(1).tolist()
    return PackedRows(model, batch.prompt_ids, batch.prompt_mask, reply, lengths, fixed)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
ROTATIONS = {
    "longrope": Phi3Config(
        **SHAPE,
        original_max_position_embeddings=16,
        rope_parameters=LONG | {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4},
    ),
    "dynamic": LlamaConfig(
        **SHAPE | {"max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    ),
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_a_rotation_that_depends_on_the_length_has_no_beginning_beyond_it(kind: str) -> None:
    """Its keys would be turned for a row as short as they are."""
    model = model_of(ROTATIONS[kind])
    with model.frozen():
        rows = rows_of(model, 12)
        assert rows.width > 16
        assert rows.computed == rows.width
        config = model.module.config
        config.max_position_embeddings = rows.width
        config.rope_parameters |= {"original_max_position_embeddings": rows.width}
        assert rows_of(model, 12).computed == rows.width - 12


@pytest.mark.parametrize("kind", ROTATIONS)
def test_a_search_for_suffixes_across_that_length_is_refused(kind: str) -> None:
    model, batch = model_of(ROTATIONS[kind]), ragged_batch(size=1, prompt=12)
    reply = Reply(batch.harmful_ids, batch.harmful_mask)
    prefix = prefix_cache(model, batch.prompt_ids, batch.prompt_mask)
    rest = model.embed(torch.ones(1, 8, dtype=torch.long))
    own = prefix, torch.tensor([0]), rest, torch.ones(1, 8, dtype=torch.bool), reply
    with pytest.raises(ValueError, match="12 tokens with 12 more .* shorten prompts or targets"):
        continued_log_probs(model, *own)


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
        ),
    ],
    ids=["mixture of experts", "alibi"],
)
@pytest.mark.parametrize(
    "attack", [EmbeddingPGD(epsilon=0.5, num_steps=2), SoftPrompt(num_tokens=2, num_steps=2)]
)
def test_attacks_of_unusual_decoders_report_the_loss_that_they_reach(
    config: PreTrainedConfig, attack: Any
) -> None:
    model, batch = model_of(config), ragged_batch(size=2)
    found = attack(model, batch)
    reply = Reply(batch.harmful_ids, batch.harmful_mask)
    with torch.no_grad(), found.applied(model) as embeds:
        (scores,) = model.reply_log_probs(embeds, found.prompt_mask, reply)
    reached = -scores.sum(1) / reply.mask.sum(1)
    torch.testing.assert_close(found.best_loss, reached, atol=1e-5, rtol=1e-5)


def test_a_beginning_ends_before_the_last_token_of_the_shortest_prompt() -> None:
    """That token predicts the reply's first."""
    model = LanguageModel(tiny_model(dtype=torch.float64))
    with model.frozen():
        whole, cut = rows_of(model, 0, size=3), rows_of(model, 99, size=3)
        assert 0 < cut.computed < cut.width
        torch.testing.assert_close(cut.log_probs(cut.clean), whole.log_probs(whole.clean), atol=1e-9, rtol=0)


def test_a_decoder_that_reads_rows_without_their_beginning_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = LanguageModel(tiny_model())
    whole = packed.decode

    def forgetful(module: Any, embeds: Any, attention: Any, positions: Any, cache: Any) -> Any:
        return whole(module, embeds, None, positions, DynamicCache())

    with model.frozen():
        rows = rows_of(model, 12)
        monkeypatch.setattr(packed, "decode", forgetful)
        with pytest.raises(RuntimeError, match="0 of 2 layers asked for their beginnings"):
            rows.log_probs(rows.clean)
