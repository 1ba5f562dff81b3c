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
from lightning_modules.models.direction_change import States, _inner, changes, effective_rank, last_states
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import LanguageModel, encoded
from tests.support.moved import loaded

TOTAL = Metric("direction", "harmful", block="direction")


def data(harmless: bool = True, batch_size: int = 16) -> EvaluationData:
    own = EvaluationData(
        TokenizerConfig("tinychat:aligned"),
        EvaluationSets(
            harmful=[TinyChatHarmful("validation", num_rows=40)],
            harmless=[TinyChatBenign("validation", 48, categories=["guide"])] if harmless else [],
            batch_size=batch_size,
        ),
    )
    own.setup("test")
    return own


def measured(
    folder: Path, model: LanguageModel, base: Reference, step: int = 0, batch_size: int = 16
) -> Snapshot:
    own = DirectionEvaluation()
    rows = data(batch_size=batch_size)
    own.attach(rows)
    session = Session(Place(model, folder, "test", step, base=base), rows, [own])
    for job in session.jobs:
        session.do(job)
    return session.finish()


def states(seed: int, *centres: torch.Tensor, n: int = 40, m: int = 60, noise: float = 1.0) -> States:
    """Two layers' clouds: harmful requests around the centre, harmless ones around 0."""
    generator = torch.Generator().manual_seed(seed)
    dim = centres[0].shape[0]
    harmful = torch.stack([c + noise * torch.randn(n, dim, generator=generator) for c in centres])
    return States(harmful, noise * torch.randn(len(centres), m, dim, generator=generator))


def axis(dim: int, *lengths: float) -> torch.Tensor:
    return torch.cat([torch.tensor(lengths), torch.zeros(dim - len(lengths))])


def test_a_direction_that_is_turned_by_hand_is_turned_by_so_much() -> None:
    """Clouds without noise have their centres' angle."""
    before = states(0, axis(8, 5.0), axis(8, 5.0), noise=1e-6)
    after = States(before.harmful.clone(), before.harmless)
    after.harmful[1, :, 1] += 10.0  # the second layer's alone
    first, second, mean = changes(before, after)
    assert first.cosine == pytest.approx(1) and first.along == pytest.approx(1)
    assert (first.low, first.high) == (pytest.approx(1), pytest.approx(1))
    assert second.cosine == pytest.approx(5 / math.hypot(5, 10), rel=1e-4)
    assert second.along == pytest.approx(1, rel=1e-4)
    assert second.length == pytest.approx(math.hypot(5, 10) / 5, rel=1e-4)
    assert mean.cosine == pytest.approx((1 + second.cosine) / 2)


def test_inner_products_are_of_different_requests_only() -> None:
    """Against loops over pairs, of all requests and without one of either kind."""
    before, after = states(1, axis(4, 1.0), n=5, m=6), states(2, axis(4, 0.5, 1.0), n=5, m=6)

    def inner(one: States, other: States, bad: list[int], good: list[int]) -> float:
        def among(x: torch.Tensor, y: torch.Tensor, rows: list[int]) -> float:
            found = [float(x[i] @ y[j]) for i in rows for j in rows if i != j]
            return sum(found) / len(found)

        def across(x: torch.Tensor, y: torch.Tensor, rows: list[int], columns: list[int]) -> float:
            return sum(float(x[i] @ y[j]) for i in rows for j in columns) / (len(rows) * len(columns))

        h, g = (one.harmful[0], other.harmful[0]), (one.harmless[0], other.harmless[0])
        return (
            among(*h, bad) + among(*g, good) - across(h[0], g[1], bad, good) - across(g[0], h[1], good, bad)
        )

    found = _inner(before, after, 0)
    every = [*range(5)], [*range(6)]
    assert float(found[0]) == pytest.approx(inner(before, after, *every), rel=1e-5)
    assert float(found[3]) == pytest.approx(inner(before, after, [0, 1, 3, 4], every[1]), rel=1e-5)
    assert float(found[6 + 4]) == pytest.approx(inner(before, after, every[0], [0, 1, 2, 3, 5]), rel=1e-5)
    assert len(found) == 1 + 5 + 6


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_the_interval_holds_the_truth_where_there_are_more_dimensions_than_requests(shared: float) -> None:
    """Noise that both models share, or not, turns the plain cosine towards 1, or away from it."""
    dim, truth = 576, 5 / math.hypot(5, 4)
    held, cosines, plain = 0, [], []
    for seed in range(100):
        before = states(seed, axis(dim, 5.0))
        own = states(9_000 + seed, axis(dim, 5.0, 4.0))
        after = States(
            axis(dim, 5.0, 4.0)
            + shared * (before.harmful - axis(dim, 5.0))
            + (1 - shared) * (own.harmful - axis(dim, 5.0, 4.0)),
            shared * before.harmless + (1 - shared) * own.harmless,
        )
        found = changes(before, after)[0]
        held += found.low <= truth <= found.high
        cosines.append(found.cosine)
        old, new = (s.harmful[0].mean(0) - s.harmless[0].mean(0) for s in (before, after))
        plain.append(float(torch.nn.functional.cosine_similarity(old, new, dim=0)))
    assert held >= 88  # of 100; at 95 % fewer in 1 of 200
    assert sum(cosines) / 100 == pytest.approx(truth, abs=0.02)
    assert abs(sum(plain) / 100 - truth) > 0.03


def test_what_is_no_direction_or_not_finite_has_no_angle() -> None:
    nothing = states(0, axis(50, 0.0), n=8, m=8)
    far = next(
        own
        for own in (states(seed, axis(50, 0.0), n=8, m=8) for seed in range(50))
        if float(_inner(own, own, 0)[0]) < 0
    )
    assert math.isnan(changes(far, nothing)[0].cosine)
    broken = states(0, axis(50, 3.0), n=8, m=8)
    broken.harmful[0, 2, 4] = math.inf
    found = changes(states(0, axis(50, 3.0), n=8, m=8), broken)[0]
    assert math.isnan(found.cosine) and math.isnan(found.rank)


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
        assert own.cosine.value == pytest.approx(1, abs=1e-5) and own.cosine.n == 40
        assert own.along == pytest.approx(1, abs=1e-5) and own.rank == pytest.approx(own.rank_before)
    assert found.measures[TOTAL].estimate.value == pytest.approx(1, abs=1e-5)
    assert found.complete and not found.samples


def test_a_moved_model_s_rows_are_its_table_and_figure(tmp_path: Path) -> None:
    model, base = loaded(True, moved=0.05)
    found = measured(tmp_path, model, base)
    # In one batch as in several.
    batches = [[*data(batch_size=50).loader(s, None, 0, 1)] for s in ("harmful", "harmless")]
    assert [len(own) for own in batches] == [1, 1]
    prompts = [encoded(model, requests_of(own[0])) for own in batches]
    model.module.eval()
    after = last_states(model, *prompts)
    with base.active() as before:
        expected = changes(last_states(LanguageModel(before.module, model.chat), *prompts), after)
    for told, own in zip(found.directions, expected, strict=True):
        assert told.cosine.value == pytest.approx(own.cosine, abs=1e-3)
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
