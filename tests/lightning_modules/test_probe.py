"""Probe sampling: which candidates the attacked model reads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.probe import ProbeSampling, agreement
from lightning_modules.models.loading import ModelConfig
from tests.conftest import chat_model, text_batch

DRAFT = ModelConfig("tinychat:helpful")


@dataclass
class Scores:
    scores: Tensor
    places: Tensor

    def joined(self, other: Scores) -> Scores:
        return Scores(torch.cat([self.scores, other.scores]), torch.cat([self.places, other.places]))


def rngs(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def read(draft: Tensor, attacked: Tensor, owners: list[int], probe: ProbeSampling) -> Scores:
    return probe.read(draft, owners, rngs(max(owners) + 1), lambda own: Scores(attacked[own], own))


def test_a_draft_that_agrees_leaves_one_candidate_and_it_is_the_best() -> None:
    losses = torch.randperm(64).float()
    found = read(2 * losses + 1, losses, [0] * 64, ProbeSampling(DRAFT))
    assert len(found.places) == 4 + 1  # 64 / 16 probes
    assert found.scores.min() == 0.0
    assert len(set(found.places.tolist())) == 5


def test_a_draft_that_disagrees_leaves_the_most() -> None:
    losses = torch.randperm(64).float()
    found = read(-losses, losses, [0] * 64, ProbeSampling(DRAFT))
    assert len(found.places) == 4 + 64 // 8


def test_behaviours_are_chosen_for_one_by_one() -> None:
    losses = torch.randperm(64).float()
    owners = [i % 2 for i in range(64)]
    draft = torch.where(torch.arange(64) % 2 == 0, losses, -losses)
    probe = ProbeSampling(DRAFT)
    found = read(draft, losses, owners, probe)
    first = found.places[found.places % 2 == 0]
    assert (len(first), len(found.places) - len(first)) == (2 + 1, 2 + 4)
    own = torch.arange(0, 64, 2)
    alone = read(losses[own], losses[own], [0] * 32, probe)
    assert sorted((2 * alone.places).tolist()) == sorted(first.tolist())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 21.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], 0.0),
        # By hand: ranks 1 2 3 against 1 3 2 differ by 0 1 1: rho = 1 - 6 * 2 / (3 * 8) = 0.5.
        ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], 0.75),
        ([1.0, 1.0], [1.0, 2.0], 0.5),
        ([1.0], [1.0], 0.5),
        # A candidate without a loss is the worst, for both.
        ([1.0, 2.0, torch.nan], [10.0, 20.0, torch.nan], 1.0),
    ],
)
def test_agreement_is_spearman_s_rank_correlation(a: list[float], b: list[float], expected: float) -> None:
    assert agreement(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)


def test_gcg_with_a_probe_reads_fewer_candidates_and_still_descends() -> None:
    model, batch = chat_model(), text_batch(2)
    settings = {"num_tokens": 5, "num_steps": 6, "width": 32, "topk": 16, "stop_at_target": False}
    whole = GCG(**settings)(model, batch, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    attack = GCG(**settings, probe=ProbeSampling(DRAFT))  # type: ignore[arg-type]
    probed = attack(model, batch, torch.Generator().manual_seed(0))
    # Each step reads two probes of 32 and between one and four favourites.
    assert (probed.forward_passes <= 1 + 6 * (1 + 2 + 4)).all()
    assert (probed.forward_passes < whole.forward_passes / 3).all()
    assert (probed.best_loss < probed.start_loss).all()


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    draft = ModelConfig("tinychat:base", from_scratch=True, config={"vocab_size": 1999})
    with pytest.raises(ValueError, match="probe.draft: expected the model's vocabulary of"):
        GCG(num_steps=1, probe=ProbeSampling(draft))(chat_model(), text_batch(1))
