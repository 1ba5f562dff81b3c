"""The refusal direction before and after training: unmoved where nothing was learned, by hand elsewhere."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from callbacks.evaluations.direction import DirectionEvaluation
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.session import Place, Session
from callbacks.metrics.names import Metric
from callbacks.report.directions import MEAN, moved
from callbacks.report.figures import drawings
from callbacks.report.load import load
from callbacks.report.results import Snapshot
from datamodules.evaluation import EvaluationData, EvaluationSets
from datamodules.results import read_rows
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from datamodules.text.tokenizers import TokenizerConfig
from lightning_modules.defences.base import requests_of
from lightning_modules.models.direction_change import States, changes, effective_rank
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import LanguageModel, encoded
from lightning_modules.models.refusal_direction import mean_differences
from tests.callbacks.test_divergence import loaded

TOTAL = Metric("direction", "harmful", block="direction")


def data(harmless: bool = True, batch_size: int = 4) -> EvaluationData:
    own = EvaluationData(
        TokenizerConfig("tinychat:aligned"),
        EvaluationSets(
            harmful=[TinyChatHarmful("validation", num_rows=10)],
            harmless=[TinyChatBenign("validation", 12, categories=["guide"])] if harmless else [],
            batch_size=batch_size,
        ),
    )
    own.setup("test")
    return own


def measured(
    folder: Path, model: LanguageModel, base: Reference, step: int = 0, batch_size: int = 4
) -> Snapshot:
    own = DirectionEvaluation()
    rows = data(batch_size=batch_size)
    own.attach(rows)
    session = Session(Place(model, folder, "test", step, base=base), rows, [own])
    for job in session.jobs:
        session.do(job)
    return session.finish()


def states(seed: int, shift: torch.Tensor) -> States:
    generator = torch.Generator().manual_seed(seed)
    harmful, harmless = (torch.randn(2, n, 8, generator=generator) for n in (40, 60))
    return States(harmful + shift, harmless)


def test_a_direction_that_is_turned_by_hand_is_turned_by_so_much() -> None:
    """The harmful cloud is moved from the first axis to between the first two, and farther away."""
    shift = torch.zeros(2, 1, 8)
    shift[..., 0] = 5.0
    before = states(0, shift)
    turned = torch.zeros(2, 1, 8)
    turned[1, :, 1] = 10.0  # the second layer's alone
    after = States(before.harmful + turned, before.harmless)
    first, second, mean = changes(before, after)
    assert first.cosine == pytest.approx(1) and first.along == pytest.approx(1)
    assert (first.low, first.high) == (pytest.approx(1), pytest.approx(1))
    old, new = (own.harmful[1].mean(0) - own.harmless[1].mean(0) for own in (before, after))
    cosine = float(old @ new / (old.norm() * new.norm()))
    assert 0.3 < cosine < 0.6
    assert second.cosine == pytest.approx(cosine) and second.low < cosine < second.high
    assert second.along == pytest.approx(float(old @ new / (old @ old)), rel=1e-5)
    assert second.length == pytest.approx(float(new.norm() / old.norm()), rel=1e-5)
    assert mean.cosine == pytest.approx((1 + cosine) / 2) and mean.low < mean.cosine < mean.high
    # Two halves of the same cloud agree better than the turned one with the old.
    assert cosine < 0.9 < second.halves < 1


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Against the angle of the clouds' own centres."""
    shift, turned = torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)
    shift[..., 0], turned[..., 1] = 5.0, 4.0
    truth = 5 / math.hypot(5, 4)
    held = 0
    for seed in range(60):
        before = states(seed, shift)
        noise = 0.3 * torch.randn(before.harmful.shape, generator=torch.Generator().manual_seed(900 + seed))
        own = changes(before, States(before.harmful + turned + noise, before.harmless))[0]
        held += own.low <= truth <= own.high
    assert held >= 51  # of 60; binomial at 95 %: below in 1 of 1,000


def test_effective_rank_counts_dimensions() -> None:
    assert effective_rank(torch.outer(torch.arange(1.0, 6), torch.ones(7))) == pytest.approx(1)
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    # Shares 3/4 and 1/4: exp of their entropy.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected)


def test_few_requests_are_refused() -> None:
    own = States(torch.randn(2, 3, 4), torch.randn(2, 9, 4))
    with pytest.raises(ValueError, match="expected at least 4 harmful and harmless requests, got"):
        changes(own, own)


@pytest.mark.parametrize("lora", [True, False])
def test_an_untrained_model_has_moved_nothing(tmp_path: Path, lora: bool) -> None:
    model, base = loaded(lora)
    found = measured(tmp_path, model, base)
    assert [own.name for own in found.directions] == [*(f"layer {i:03d}" for i in range(5)), MEAN]
    for own in found.directions:
        assert own.cosine.value == pytest.approx(1, abs=1e-5) and own.cosine.n == 10
        assert own.along == pytest.approx(1, abs=1e-5) and own.rank == pytest.approx(own.rank_before)
        assert -1 < own.halves < 1
    assert found.measures[TOTAL].estimate.value == pytest.approx(1, abs=1e-5)
    assert found.complete and not found.samples


def test_a_moved_model_s_rows_are_its_table_and_figure(tmp_path: Path) -> None:
    model, base = loaded(True, moved=0.5)
    found = measured(tmp_path, model, base)
    # Against the differences that directional ablation takes, of the same requests, in one batch.
    batches = [[*data(batch_size=20).loader(s, None, 0, 1)] for s in ("harmful", "harmless")]
    assert [len(own) for own in batches] == [1, 1]
    model.module.eval()
    prompts = [encoded(model, requests_of(own[0])) for own in batches]
    new = mean_differences(model, *prompts, num_positions=1)
    with base.active() as before:
        old = mean_differences(LanguageModel(before.module, model.chat), *prompts, num_positions=1)
    for told, one, other in zip(found.directions, new, old, strict=False):
        cosine = torch.nn.functional.cosine_similarity(one.vector, other.vector, dim=0)
        assert told.cosine.value == pytest.approx(float(cosine), abs=1e-4)
    assert found.directions[0].cosine.value < 0.999
    results = load(tmp_path, "test")
    table = moved(results)
    assert len(table.rows) == 6 and table.rows[-1][0].text == MEAN
    assert "direction" in drawings(results)
    assert len(list(read_rows(tmp_path))) == 6


def test_harmless_requests_are_needed(tmp_path: Path) -> None:
    own, rows = DirectionEvaluation(Schedule()), data(harmless=False)
    own.attach(rows)
    model, base = loaded(True)
    with pytest.raises(ValueError, match="DirectionEvaluation: found no requests of both kinds"):
        Session(Place(model, tmp_path, "test", 0, base=base), rows, [own])
