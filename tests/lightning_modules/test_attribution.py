"""Contributions of single tokens to a refusal: gradients against differences, sums against the margin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from datamodules.batch import AdversarialBatch
from lightning_modules.models.attribution import contributions, refusal_margins
from lightning_modules.models.language_model import LanguageModel
from tests.conftest import ragged_batch, tiny_model

OPENING = 2


def wide_model() -> LanguageModel:
    """In float64 throughout (transformers' norms compute in fp32), with weights large enough to matter."""
    module = tiny_model(dtype=torch.float64)
    for part in list(module.modules()):
        for name, own in part.named_children():
            if isinstance(own, LlamaRMSNorm):
                setattr(part, name, nn.RMSNorm(len(own.weight), own.variance_epsilon, dtype=torch.float64))
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 2:
                weight.mul_(6)
    return LanguageModel(module)


@torch.no_grad()
def margin_by_hand(model: LanguageModel, batch: AdversarialBatch, row: int, embeds: Tensor) -> Tensor:
    """log p of the safe opening - log p of the harmful one, one unpadded pass of the model per opening."""
    found = []
    for ids, mask in ((batch.safe_ids, batch.safe_mask), (batch.harmful_ids, batch.harmful_mask)):
        reply = ids[row][mask[row]][:OPENING]
        own = embeds[batch.prompt_mask[row]]
        fed = torch.cat([own, model.embed(reply)])[None]
        logits = model.module(inputs_embeds=fed).logits[0].log_softmax(1)
        places = torch.arange(len(reply)) + len(own) - 1
        found.append(logits[places, reply].sum())
    return found[0] - found[1]


def test_the_margin_is_of_the_openings_alone() -> None:
    model, batch = wide_model(), ragged_batch()
    embeds = model.embed(batch.prompt_ids)
    found = refusal_margins(model, batch, embeds, OPENING)
    for row in range(len(batch)):
        expected = margin_by_hand(model, batch, row, embeds[row])
        torch.testing.assert_close(found[row], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_one_point_is_the_gradient_at_the_request_times_what_the_token_adds(baseline: str) -> None:
    """Moving a token along x - b by h on both sides, its contribution is the margin's slope; central
    differences in float64 tell it to h^2."""
    model, batch, h = wide_model(), ragged_batch(), 1e-5
    found, margin, _ = contributions(model, batch, OPENING, 1, baseline)  # type: ignore[arg-type]
    embeds = model.embed(batch.prompt_ids).detach()
    absent = embeds.new_zeros(embeds.shape[2])
    if baseline == "mean":
        absent = model.module.get_input_embeddings().weight.detach().mean(0)
    checked = 0
    for row in range(len(batch)):
        for place in range(embeds.shape[1]):
            if not batch.attackable_mask[row, place]:
                assert found[row, place] == 0
                continue
            ends = []
            for sign in (1, -1):
                moved = embeds[row].clone()
                moved[place] += sign * h * (embeds[row, place] - absent)
                ends.append(margin_by_hand(model, batch, row, moved))
            slope = float((ends[0] - ends[1]) / (2 * h))
            assert float(found[row, place]) == pytest.approx(slope, rel=1e-6, abs=1e-8)
            checked += abs(slope) > 1e-6
        assert float(margin[row]) == pytest.approx(float(margin_by_hand(model, batch, row, embeds[row])))
    assert checked > 3


def test_along_the_path_contributions_sum_to_what_the_request_changes() -> None:
    """Completeness: the middle rule's error falls with the square of the points; and the path's other end
    is the prompt with its attackable tokens, and no others, at the mean embedding."""
    model, batch = wide_model(), ragged_batch()
    errors = []
    for points in (16, 64, 256):
        found, margin, without = contributions(model, batch, OPENING, points, "mean")
        errors.append(float((found.sum(1) - (margin - without)).abs().max()))
        assert float((margin - without).abs().min()) > 1e-2
    assert errors[2] < 1e-3 and errors[2] < errors[1] / 4 < errors[0] / 8
    embeds = model.embed(batch.prompt_ids).detach()
    mean = model.module.get_input_embeddings().weight.detach().mean(0)
    for row in range(len(batch)):
        emptied = torch.where(batch.attackable_mask[row][:, None], mean, embeds[row])
        expected = margin_by_hand(model, batch, row, emptied)
        assert float(without[row]) == pytest.approx(float(expected), abs=1e-9)


def test_a_request_is_told_alike_alone_and_beside_others_and_the_model_is_left_as_it_was() -> None:
    model, batch = LanguageModel(tiny_model().train()), ragged_batch()
    together = contributions(model, batch, OPENING, 4, "mean")
    kept = batch.prompt_mask[1]  # a row with padding
    assert not kept.all()
    alone = replace(
        batch.select([1]),
        prompt_ids=batch.prompt_ids[1:2, kept],
        prompt_mask=batch.prompt_mask[1:2, kept],
        attackable_mask=batch.attackable_mask[1:2, kept],
    )
    found, margin, _ = contributions(model, alone, OPENING, 4, "mean")
    torch.testing.assert_close(together[0][1:2, kept], found, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[1][1:2], margin, atol=1e-5, rtol=1e-4)
    assert model.module.training
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())
    with torch.inference_mode(False), torch.no_grad():
        assert contributions(model, batch, OPENING, 1, "zero")[0].abs().max() > 0


def test_in_bf16_sums_are_fp32() -> None:
    model, batch = LanguageModel(tiny_model(dtype=torch.bfloat16)), ragged_batch()
    found, margin, without = contributions(model, batch, OPENING, 8, "mean")
    assert found.dtype == margin.dtype == without.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), margin - without, atol=0.05, rtol=0.2)
