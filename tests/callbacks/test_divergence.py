"""KL to the base model by token: zero where nothing was learned, equal to the definition elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.evaluations.divergence import DIVERGENCE, DivergenceEvaluation, divergences
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.metrics.names import Metric
from callbacks.report.divergences import depth
from callbacks.report.figures import drawings
from callbacks.report.load import load
from callbacks.report.results import Snapshot
from datamodules.batch import EvaluationBatch
from datamodules.evaluation import EvaluationData, EvaluationSets
from datamodules.results import read_rows
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.text.tokenizers import TokenizerConfig
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.reply import Reply
from tests.support.moved import loaded

TOTAL = Metric("divergence", "harmful", block="divergence")


def evaluation_data(n: int = 5) -> EvaluationData:
    own = EvaluationData(
        TokenizerConfig("tinychat:aligned"),
        EvaluationSets(harmful=[TinyChatHarmful("validation", num_rows=n)], batch_size=2),
    )
    own.setup("test")
    return own


def measured(folder: Path, model: LanguageModel, base: Any, **settings: Any) -> Snapshot:
    own = DivergenceEvaluation(**settings)
    data = evaluation_data()
    own.attach(data)
    session = Session(Place(model, folder, "test", 0, base=base), data, [own])
    for job in session.jobs:
        session.do(job)
    return session.finish()


def a_batch() -> EvaluationBatch:
    (batch,) = evaluation_data(2).loader("harmful", None, 0, 1)
    return batch


@pytest.mark.parametrize("lora", [True, False])
def test_an_untrained_model_is_its_base_at_every_token(tmp_path: Path, lora: bool) -> None:
    found = measured(tmp_path, *loaded(lora), positions=4)
    assert len(found.divergences) == 4
    assert all(own.value == pytest.approx(0.0, abs=1e-6) and own.n == 5 for own in found.divergences)
    assert found.measures[TOTAL].estimate.value == pytest.approx(0.0, abs=1e-6)
    assert not found.samples  # no reply that could be read
    assert found.complete


def test_the_reference_stays_as_it_was_loaded() -> None:
    """Training may compare with it: an evaluation in bf16 must not round it for good."""
    model, base = loaded(False)
    with base.active() as before:
        weights = {name: value.clone() for name, value in before.module.state_dict().items()}
    model.module.to(torch.bfloat16)
    assert torch.allclose(divergences(model, base, a_batch(), 3), torch.zeros(()), atol=1e-6)
    with base.alike() as one, base.alike() as other:
        assert one is other  # no copy a batch
        assert one.module.dtype == torch.bfloat16
    with base.active() as after:
        assert all(torch.equal(weights[name], value) for name, value in after.module.state_dict().items())


@pytest.mark.parametrize("lora", [True, False])
def test_it_is_the_definition_token_by_token(lora: bool) -> None:
    """Against one pass per token, from the probabilities."""
    (model, base), batch = loaded(lora, moved=0.5), a_batch()
    model.module.eval()
    found, targets = divergences(model, base, batch, 3), batch.adversarial
    assert targets is not None
    for row in range(2):
        ids = targets.prompt_ids[row][targets.prompt_mask[row]]
        for token in range(3):
            seen = torch.cat([ids, targets.harmful_ids[row, :token]])[None]
            with torch.no_grad():
                own = model.module(input_ids=seen).logits[0, -1].double().softmax(-1)
            with base.active() as before:
                known = before.module(input_ids=seen).logits[0, -1].double().softmax(-1)
            expected = float((own * (own / known).log()).sum())
            assert expected > 1e-4
            assert float(found[row, token]) == pytest.approx(expected, rel=1e-3)


def test_a_row_a_token_and_a_table_and_a_figure_from_them(tmp_path: Path) -> None:
    found = measured(tmp_path, *loaded(True, moved=0.5), positions=3)
    rows = list(read_rows(tmp_path))
    assert len(rows) == 15
    first = [float(row.verdicts[DIVERGENCE]["score"] or 0.0) for row in rows if row.repetition == 0]
    assert found.divergences[0].value == pytest.approx(math.fsum(first) / 5)
    assert found.measures[TOTAL].estimate.value == pytest.approx(
        math.fsum(own.value for own in found.divergences) / 3
    )
    results = load(tmp_path, "test")
    table = depth(results)
    assert [row[0].text for row in table.rows] == ["1", "2", "3"]
    assert "depth" in drawings(results)


def test_a_target_that_ends_earlier_has_fewer_tokens(tmp_path: Path) -> None:
    found = measured(tmp_path, *loaded(True, moved=0.5), positions=1000)
    batches = list(evaluation_data().loader("harmful", None, 0, 1))
    targets = [batch.adversarial for batch in batches if batch.adversarial is not None]
    lengths = [int(n) for own in targets for n in own.harmful_mask.sum(1)]
    assert [own.n for own in found.divergences] == [
        sum(length > position for length in lengths) for position in range(max(lengths))
    ]
    # A position's share is of all tokens' nats: one that few targets reach weighs as few.
    rows = list(read_rows(tmp_path))
    nats = [float(row.verdicts[DIVERGENCE]["score"] or 0.0) for row in rows]
    last = [own for row, own in zip(rows, nats, strict=True) if row.repetition == max(lengths) - 1]
    assert len(last) < len(batches) * 2
    shares = [row[2] for row in depth(load(tmp_path, "test")).rows]
    assert shares[-1].order == pytest.approx(math.fsum(last), rel=1e-6)
    assert shares[-1].text == f"{100 * math.fsum(last) / math.fsum(nats):.0f} %"


def test_what_is_on_disk_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = loaded(True, moved=0.5)
    before = measured(tmp_path, model, base, positions=3)

    def never(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("callbacks.evaluations.divergence.divergences", never)
    assert measured(tmp_path, model, base, positions=3).divergences == before.divergences


def test_without_requests_it_says_what_is_missing(tmp_path: Path) -> None:
    own = DivergenceEvaluation(Schedule())
    with pytest.raises(ValueError, match="DivergenceEvaluation: expected evaluation data and a base model"):
        own.work(Place(loaded(True)[0], tmp_path, "test", 0), "w")


def test_padding_beyond_a_target_counts_nothing() -> None:
    (model, base), batch = loaded(True, moved=0.5), a_batch()
    targets = batch.adversarial
    assert targets is not None
    width = targets.harmful_mask.shape[1]
    found = divergences(model, base, batch, width)
    reply = Reply(targets.harmful_ids, targets.harmful_mask)
    assert bool((found[~reply.mask] == 0).all())
