"""An attack whose iterations are one compiled graph finds what it finds without."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from torch._dynamo import explain, reset
from torch._dynamo.utils import counters

from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.models import packed
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.packed import PackedRows
from lightning_modules.models.passes import PassCounter
from lightning_modules.models.reply import Reply
from tests.conftest import ragged_batch, tiny_model
from tests.support.adapters import lora

# Of torch's own, about torch's own, while it traces.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        "THUNDERCAT_COMPILE" not in os.environ or shutil.which("g++") is None,
        reason="the C++ of a graph takes a minute to compile: THUNDERCAT_COMPILE=1, with g++ installed",
    ),
)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_compiled_attack_is_the_attack(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reset()
    counters.clear()
    graph = torch.compile(packed._scores, fullgraph=True, backend=backend)
    monkeypatch.setattr(packed, "_graph", lambda: graph)
    module = lora(tiny_model(num_hidden_layers=1))
    eager, compiled = LanguageModel(module), LanguageModel(module, compiled=True)
    attack = EmbeddingPGD(epsilon=0.5, num_steps=3)
    # Two widths, and weights that have changed since: two graphs, with the width left open, are enough.
    for size in (3, 2, 3):
        batch = ragged_batch(size=size)
        with PassCounter() as alone:
            expected = attack(eager, batch)
        with PassCounter() as counted:
            found = attack(compiled, batch)
        assert expected.delta is not None
        assert found.delta is not None
        assert expected.delta.abs().max() > 1e-3
        torch.testing.assert_close(found.delta, expected.delta, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.loss_curve, expected.loss_curve, atol=1e-6, rtol=0)
        assert (counted.forward, counted.backward) == (alone.forward, alone.backward)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.01)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    reset()


def test_an_iteration_is_one_graph_without_a_break() -> None:
    reset()
    batch = ragged_batch()
    model = LanguageModel(lora(tiny_model(num_hidden_layers=1)), compiled=True)
    given: list[Any] = []
    with pytest.MonkeyPatch.context() as patch, model.frozen():
        patch.setattr(packed, "_scored_by_graph", lambda *own: given.append(own) or packed._scores(*own))
        rows = PackedRows(
            model, batch.prompt_ids, batch.prompt_mask, Reply(batch.harmful_ids, batch.harmful_mask)
        )
        rows.log_probs(rows.clean.clone().requires_grad_())
        said = explain(packed._scores)(*given[0])
    assert (said.graph_count, said.graph_break_count) == (1, 0)
    reset()


def test_what_cannot_be_compiled_says_which_field(monkeypatch: pytest.MonkeyPatch) -> None:
    reset()
    whole = packed._scores

    def broken(*arguments: Any) -> torch.Tensor:
        torch._dynamo.graph_break()
        return whole(*arguments)

    graph = torch.compile(broken, fullgraph=True, backend="eager")
    monkeypatch.setattr(packed, "_graph", lambda: graph)
    model = LanguageModel(tiny_model(num_hidden_layers=1), compiled=True)
    with pytest.raises(ValueError, match="base.compile_attacks: no graph could be made .*; set it to false"):
        EmbeddingPGD(epsilon=0.5, num_steps=1)(model, ragged_batch())
    reset()


def test_beyond_the_limit_of_graphs_rows_are_scored_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reset()
    graph = torch.compile(packed._scores, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(packed, "_graph", lambda: graph)
    module = tiny_model(num_hidden_layers=1)
    attack = EmbeddingPGD(epsilon=0.5, num_steps=1)
    with torch._dynamo.config.patch(recompile_limit=1):
        for size in (3, 2):
            batch = ragged_batch(size=size)
            found = attack(LanguageModel(module, compiled=True), batch).delta
            torch.testing.assert_close(found, attack(LanguageModel(module), batch).delta, atol=1e-6, rtol=0)
    assert "rows of too many kinds for one graph" in caplog.text
    reset()
