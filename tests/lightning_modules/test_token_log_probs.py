"""The chunked log-probabilities equal log_softmax, in value and gradient, for every logit transform."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.models import token_log_probs as module
from lightning_modules.models.token_log_probs import LogitTransform, token_log_probs

TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.25),
    LogitTransform(softcap=3.0),
    LogitTransform(scale=0.5, softcap=2.0),
]


def problem(bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=g, dtype=torch.float64)
    return (
        hidden,
        weight,
        torch.randn(11, generator=g, dtype=torch.float64) if bias else None,
        torch.tensor([0, 3, 10, 3, 0, 1, 9]),
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 33)  # three rows of an 11-token vocabulary


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_log_softmax(transform: LogitTransform, bias: bool) -> None:
    hidden, weight, b, targets = problem(bias)
    expected = (
        transform(torch.nn.functional.linear(hidden, weight, b))
        .log_softmax(1)
        .gather(1, targets[:, None])
        .squeeze(1)
    )
    torch.testing.assert_close(token_log_probs(hidden, weight, b, targets, transform), expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradient_by_finite_differences(transform: LogitTransform) -> None:
    hidden, weight, b, targets = problem(True)
    assert torch.autograd.gradcheck(lambda h: token_log_probs(h, weight, b, targets, transform), (hidden,))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradient_of_a_learning_head(transform: LogitTransform) -> None:
    hidden, weight, b, targets = problem(True)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: token_log_probs(h, w, b, targets, transform), (hidden, weight)
    )


def test_hand_derived_value() -> None:
    # logits (ln 1, ln 3) give p = (1/4, 3/4).
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [torch.tensor(3.0).log()]])
    value = token_log_probs(hidden, weight, None, torch.tensor([1]))
    assert value.item() == pytest.approx(torch.tensor(0.75).log().item())


def test_no_scored_token() -> None:
    _, weight, _, _ = problem(False)
    assert token_log_probs(
        torch.empty(0, 5).double(), weight, None, torch.empty(0, dtype=torch.long)
    ).shape == (0,)


def test_bf16_weights_give_fp32_scores() -> None:
    hidden, weight, _, targets = problem(False)
    scores = token_log_probs(hidden.detach().bfloat16(), weight.bfloat16(), None, targets)
    assert scores.dtype == torch.float32
