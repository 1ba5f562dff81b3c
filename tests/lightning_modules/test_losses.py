"""Objectives against hand-derived values and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.losses.base import ReplyScores
from lightning_modules.losses.toward_away import TowardAwayUtility
from lightning_modules.models.likelihood import mean_cross_entropy, soft_cutoff, unlikelihood

LOG = torch.tensor


def test_mean_cross_entropy_counts_masked_tokens_only() -> None:
    # Row 0: -(ln 1/2 + ln 1/4) / 2 = 1.5 ln 2; row 1: one token, ln 8.
    log_probs = torch.log(LOG([[0.5, 0.25], [0.125, 0.9]]))
    mask = LOG([[True, True], [True, False]])
    torch.testing.assert_close(mean_cross_entropy(log_probs, mask), LOG([1.5 * math.log(2), math.log(8)]))


def test_unlikelihood_by_hand_and_continuous_at_its_floor() -> None:
    # Trap: zeroing tokens below the threshold makes the loss jump there.
    log_probs = torch.log(LOG([[0.5, 0.2]]))
    torch.testing.assert_close(
        unlikelihood(log_probs, torch.ones(1, 2, dtype=torch.bool)),
        LOG([-(math.log(0.5) + math.log(0.8)) / 2]),
    )
    one = torch.ones(1, 1, dtype=torch.bool)
    above, below = (unlikelihood(LOG([[-5.0 + d]]), one) for d in (1e-6, -1e-6))
    assert abs(above - below).item() < 1e-6
    assert below.item() == pytest.approx(-math.log(1 - math.exp(-5)))
    assert torch.isfinite(unlikelihood(LOG([[0.0]]), one)).all()


def test_soft_cutoff_is_per_example_and_continuous() -> None:
    # Below c = 0.5: 0.999 * 0.5 + 0.001 * L. One easy example must not silence the other (trap: cutoff on the
    # mean).
    losses = LOG([0.1, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    cut = soft_cutoff(losses, 0.5)
    torch.testing.assert_close(cut, LOG([0.4995 + 0.0001, 2.0, 0.5], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(cut.sum(), losses)
    torch.testing.assert_close(gradient[:2], LOG([0.001, 1.0], dtype=torch.float64))


def scores(safe: list[float], harmful: list[float]) -> ReplyScores:
    """One-token replies with the given probabilities."""
    mask = torch.ones(len(safe), 1, dtype=torch.bool)
    return ReplyScores(torch.log(LOG(safe))[:, None], mask, torch.log(LOG(harmful))[:, None], mask)


def test_toward_away_by_hand() -> None:
    # Example 0: toward ln 4 = 1.386 (> 0.5), away -ln 2 (> -5): 0.5 ln 4 - 0.5 ln 2 = 0.5 ln 2.
    # Example 1: toward ln(1/0.9) < 0.5: 0.4995 + 0.001 * 0.10536; away -ln(1e4) = -9.21 < -5: -4.995 -
    # 0.00921.
    terms = TowardAwayUtility().adversarial(scores([0.25, 0.9], [0.5, 1e-4]))
    second = 0.5 * (0.4995 + 0.001 * -math.log(0.9)) + 0.5 * (0.999 * -5 + 0.001 * math.log(1e-4))
    torch.testing.assert_close(terms.loss, LOG([0.5 * math.log(2), second]))
    torch.testing.assert_close(terms.parts["loss_away"], LOG([-math.log(2), math.log(1e-4)]))
    assert not terms.parts["loss_toward"].requires_grad


def test_weights_and_forms() -> None:
    objective = TowardAwayUtility(weight_toward=0.0, weight_away=2.0, weight_utility=3.0, away_form="log1m")
    torch.testing.assert_close(objective.adversarial(scores([0.5], [0.5])).loss, LOG([2 * math.log(2)]))
    torch.testing.assert_close(
        objective.utility(torch.log(LOG([[0.5]])), torch.ones(1, 1, dtype=torch.bool)).loss,
        LOG([3 * math.log(2)]),
    )


@pytest.mark.parametrize("form", ["ce", "log1m"])
def test_gradients_by_finite_differences(form: str) -> None:
    g = torch.Generator().manual_seed(0)
    safe, harmful = (-torch.rand(3, 4, generator=g, dtype=torch.float64) * 3 - 0.1 for _ in range(2))
    mask = torch.arange(4)[None] < LOG([[4], [2], [1]])
    cutoffs = {"cutoff_toward": 1.0, "cutoff_away": -1.5}
    objective = TowardAwayUtility(**cutoffs, away_form=form)  # type: ignore[arg-type]
    inputs = (safe.requires_grad_(), harmful.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda s, h: objective.adversarial(ReplyScores(s, mask, h, mask)).loss, inputs
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"cutoff_toward": -0.5},
            r"cutoff_toward: expected >= 0 .* got -0.5; the negative cutoff belongs to cutoff_away",
        ),
        (
            {"cutoff_away": 5.0},
            r"cutoff_away: expected <= 0 .* got 5.0; the positive cutoff belongs to cutoff_toward",
        ),
        ({"weight_toward": -1.0}, r"weight_toward: expected a number >= 0, got -1.0"),
        (
            {"weight_toward": 0, "weight_away": 0, "weight_utility": 0},
            "expected a positive weight, got 0 for all three",
        ),
        ({"cutoff_slope": 1.0}, r"cutoff_slope: expected a number within \[0, 1\), got 1.0"),
    ],
)
def test_impossible_values(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TowardAwayUtility(**fields)  # type: ignore[arg-type]
