"""Repetition of any attack, and the ledger that all attacks keep."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.attacks.base import AttackedPrompt, NoAttack, derived_rng, draw_seed
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt
from lightning_modules.attacks.ledger import CandidateLedger, Ledger, PointLedger
from lightning_modules.attacks.progress import observed
from lightning_modules.attacks.repeat import Repeat, merged
from lightning_modules.attacks.text.rewrites import Noise, Prefilling
from lightning_modules.attacks.training.mixture import Mixture
from lightning_modules.models.language_model import LanguageModel
from tests.conftest import chat_model, ragged_batch, text_batch, tiny_model


def rng(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Accepts:
    """Accepts the replies to certain prompts from a certain time of asking on."""

    def __init__(self, prompt: str, after: int = 0) -> None:
        self.prompt, self.after = prompt, after
        self.asked: list[str] = []

    def __call__(self, prompt: str, reply: str, expected: str) -> bool:
        self.asked.append(prompt)
        return prompt == self.prompt and self.asked.count(prompt) > self.after


def runs(attack: Noise, model: LanguageModel, size: int, number: int) -> list[AttackedPrompt]:
    seed = draw_seed(rng())
    return [attack(model, text_batch(size), derived_rng(seed, i)) for i in range(number)]


def test_the_best_of_the_repetitions_wins_per_example_and_costs_add_up() -> None:
    model, attack = chat_model(), Noise("character", rate=0.5)
    single = runs(attack, model, 3, 4)
    assert len({run.prompt_ids.shape[1] for run in single}) > 1  # prompts of different lengths are the point
    found = Repeat(attack, 4)(model, text_batch(3), rng())
    losses = torch.stack([run.best_loss for run in single])
    torch.testing.assert_close(found.best_loss, losses.amin(0))
    winners = losses.argmin(0).tolist()
    assert len(set(winners)) > 1
    assert found.texts == tuple(single[run].texts[i] for i, run in enumerate(winners))
    assert found.forward_passes.tolist() == [4] * 3
    assert found.backward_passes.tolist() == [0] * 3
    for i, run in enumerate(winners):
        own = single[run].prompt_ids[i, single[run].prompt_mask[i]]
        assert found.prompt_ids[i, found.prompt_mask[i]].tolist() == own.tolist()


def test_each_repetition_draws_anew_and_more_of_them_are_no_worse() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    attack = EmbeddingPGD(epsilon=0.5, num_steps=1, random_start=True)
    few, many = (Repeat(attack, number)(model, batch, rng()) for number in (1, 6))
    assert (many.best_loss <= few.best_loss).all()
    assert (many.best_loss < few.best_loss).any()
    assert many.forward_passes.tolist() == [12] * 3


def test_a_judge_decides_first_and_ends_an_example() -> None:
    model, batch = chat_model(), text_batch(2)
    judge = Accepts(batch.prompts[1], after=1)
    found = Repeat(Noise("word", rate=0.5), 4, judge=judge, max_new_tokens=4)(model, batch, rng())
    # The second request is done after its second run; the first one is never.
    assert judge.asked.count(batch.prompts[0]) == 4
    assert judge.asked.count(batch.prompts[1]) == 2
    assert found.queries is not None
    assert found.queries.tolist() == [4, 2]
    assert found.forward_passes.tolist() == [4, 2]
    # The accepted run is the result although an earlier one may have had a lower loss.
    accepted = runs(Noise("word", rate=0.5), model, 2, 2)[1]
    assert found.texts[1] == accepted.texts[1]


def test_runs_of_different_kinds_are_joined() -> None:
    model, batch = chat_model(), text_batch(2)
    typed, free = Noise("word")(model, batch, rng()), SoftPrompt(3, num_steps=2)(model, batch)
    forced = Prefilling(2)(model, batch, rng())
    both = merged(typed, free, [0, 1], torch.tensor([False, True]))
    assert not both.is_text  # an embedding among them cannot be typed
    assert both.delta is not None
    assert not both.delta[0].any()
    assert both.delta[1].any()
    assert len(both.loss_curve) == 3
    assert both.loss_curve[1:, 0].isnan().all()
    some = merged(typed, forced, [0, 1], torch.tensor([False, True]))
    assert some.is_text
    assert [len(own) for own in some.forced] == [0, 2]
    one = merged(typed, NoAttack()(model, batch.select([1])), [1], torch.tensor([True]))
    assert one.forward_passes.tolist() == typed.forward_passes.tolist()
    assert one.loss_curve[:, 1].isnan().all()


def test_a_mixture_can_be_repeated() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    parts = [EmbeddingPGD(epsilon=0.5, num_steps=2), SoftPrompt(num_tokens=3, num_steps=2)]
    found = Repeat(Mixture(parts), 5)(model, batch, rng())
    assert (found.best_loss < found.start_loss).all()


# --- the ledger


def test_several_candidates_of_an_example_are_one_iterate() -> None:
    ledger = CandidateLedger(["a", "b", "c"], texts=list)
    rows = [0, 0, 2, 0]
    assert ledger.record(rows, ["p", "q", "r", "s"], torch.tensor([3.0, 1.0, 2.0, 1.0])) == [0, 2]
    # Of equal candidates the first counts.
    assert ledger.best == ["q", "b", "r"]
    assert ledger.record([0, 2], ["t", "u"], torch.tensor([1.0, torch.inf])) == []
    assert ledger.best == ["q", "b", "r"]
    found = ledger.attacked(torch.zeros(3, 1), torch.ones(3, 1))
    torch.testing.assert_close(
        found.loss_curve,
        torch.tensor([[1.0, torch.nan, 2.0], [1.0, torch.nan, torch.nan]]),
        equal_nan=True,
    )
    assert found.queries is None


def test_passes_are_counted_by_example_and_zero_gradients_stay() -> None:
    ledger = Ledger(3)
    ledger.count_forward(torch.tensor([0, 0, 2]))
    ledger.count_backward(torch.tensor([0, 2]), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    ledger.count_backward(torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    ledger.count_queries([1, 1])
    found = ledger.attacked(torch.zeros(3, 1), torch.ones(3, 1))
    assert found.forward_passes.tolist() == [2, 0, 1]
    assert found.backward_passes.tolist() == [2, 0, 1]
    assert found.zero_gradient.tolist() == [True, False, False]
    assert found.queries is not None
    assert found.queries.tolist() == [0, 2, 0]
    assert found.distance.isnan().all()
    assert found.loss_curve.shape == (0, 3)


def test_the_best_point_is_no_alias_of_the_moving_one() -> None:
    point = torch.zeros(2, 1, 1)
    ledger, seen = PointLedger(point), []
    with observed(lambda losses, texts: seen.append(losses.tolist())):
        ledger.record(torch.tensor([0, 1]), point, torch.tensor([2.0, 2.0]))
        point += 1
        ledger.record(torch.tensor([1]), point[1:], torch.tensor([1.0]))
        point += 1
        ledger.record(torch.tensor([0]), point[:1], torch.tensor([3.0]))
    assert ledger.best.flatten().tolist() == [0.0, 1.0]
    assert len(seen) == 3
    assert seen[0] == [2.0, 2.0]
    assert seen[1][1] == pytest.approx(1.0)


def test_one_candidate_without_a_loss_does_not_hide_the_others() -> None:
    ledger = Ledger(2)
    rows, losses = torch.tensor([0, 0, 1]), torch.tensor([torch.nan, 2.0, torch.nan])
    assert ledger.enter(rows, losses).tolist() == [False, True, False]
    assert ledger.best_loss.tolist() == [2.0, torch.inf]
