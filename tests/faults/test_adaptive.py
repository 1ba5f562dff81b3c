"""Findings of the audit about attacks that stop too early or look too little."""

from __future__ import annotations

import torch

from callbacks.judges.exact import TargetPrefix
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.random_search import RandomSearch
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig, load_model
from tests.conftest import chat_model, text_batch, tinychat_format


def test_c07_random_search_goes_on_until_the_target_is_said() -> None:
    settings = {"num_tokens": 6, "num_steps": 5, "block": 2}
    model, batch = chat_model(), text_batch(2)
    # An untrained model gives every token about 1/2048: likely enough for this trigger, and never said.
    search = RandomSearch(**settings, stop_probability=1e-5)  # type: ignore[arg-type]
    early = search(model, batch, torch.Generator())
    assert early.loss_curve.shape[0] == 1
    found = RandomSearch(**settings)(model, batch, torch.Generator())  # type: ignore[arg-type]
    assert found.loss_curve.shape[0] == 6
    assert RandomSearch().stop_probability is None


def test_c07_gcg_stops_at_what_the_judge_counts_whatever_it_searches_for() -> None:
    # A search for the target's beginning stops at its whole first sentence: what steers it and what counts
    # are two things.
    model = LanguageModel(load_model(ModelConfig("tinychat:helpful")).eval(), chat=tinychat_format())
    batch = text_batch(4)
    found = GCG(5, num_steps=30, width=32, topk=64, target_tokens=8)(
        model, batch, torch.Generator().manual_seed(0)
    )
    replies = model.reply(found)
    judge = TargetPrefix()
    left = found.loss_curve.isfinite().sum(0) < 31
    said = [judge(*given) for given in zip(batch.prompts, replies, batch.targets, strict=True)]
    assert left.any()
    assert all(ok for ok, early in zip(said, left.tolist(), strict=True) if early)
