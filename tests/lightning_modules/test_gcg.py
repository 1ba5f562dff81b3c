"""GCG's steps and options, each against a plain computation, and its benchmark's reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from callbacks.judges.exact import TargetPrefix
from datamodules.text.envelope import Envelope
from experiments.benchmarks import gcg as gcg_benchmark
from experiments.benchmarks import gcg_yardstick
from lightning_modules.attacks.chunks import Chunked
from lightning_modules.attacks.progress import observed
from lightning_modules.attacks.suffix.gcg import GCG, draw_swaps
from lightning_modules.attacks.suffix.slots import make_slot, typable_tokens
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig, load_model
from tests.conftest import FAMILIES, chat_model, text_batch, tiny_model, tinychat_format
from tests.support.suffix_search import generator


def test_first_step_is_the_best_of_all_single_swaps_the_reference_would_try() -> None:
    language_model = chat_model()
    batch = text_batch(1)
    found = GCG(num_tokens=4, num_steps=1, width=64, topk=8, stop_at_target=False)(
        language_model, batch, generator(7)
    )
    (behaviour,) = gcg_benchmark._yardstick_behaviours(language_model, batch)
    slot = make_slot(language_model.chat, batch.prompts[0], Envelope(), " x", 4)
    behaviour = dataclasses.replace(behaviour, slot=slot)
    allowed = typable_tokens(language_model.chat, 2048, True)
    start, top = gcg_yardstick.promising(language_model.module, behaviour, slot.suffix, allowed, 8)
    assert found.start_loss.item() == pytest.approx(start.item(), abs=1e-5)
    losses = []
    for position in range(4):
        for token in top[position].tolist():
            candidate = [*slot.suffix[:position], token, *slot.suffix[position + 1 :]]
            if gcg_yardstick.can_be_typed(behaviour, candidate):
                losses.append(
                    float(gcg_yardstick.candidate_losses(language_model.module, behaviour, [candidate]))
                )
    # 64 draws with replacement in up to four rounds out of at most 32 swaps reach nearly all of them.
    assert found.loss_curve[1].item() >= min(losses) - 1e-5
    assert found.loss_curve[1].item() <= sorted(losses)[2] + 1e-5


def test_swaps_change_exactly_the_asked_number_of_positions_to_proposed_tokens() -> None:
    base, top = torch.zeros(6, dtype=torch.long), torch.arange(1, 19).reshape(6, 3)
    swaps = draw_swaps(base, top, 200, 2, generator())
    assert ((swaps != 0).sum(1) == 2).all()
    for position in range(6):
        assert set(swaps[:, position].tolist()) <= {0, *top[position].tolist()}


def test_passes_follow_the_paper_s_rule() -> None:
    # Per step one gradient (a forward and a backward pass), `width` candidates, and a look at the greedy
    # reply after an improvement.
    found = GCG(num_tokens=5, num_steps=3, width=6, topk=16, stop_at_target=False)(
        chat_model(), text_batch(2), generator()
    )
    assert found.forward_passes.tolist() == [3 * 7] * 2
    assert found.backward_passes.tolist() == [3] * 2


def test_a_buffer_never_moves_to_a_worse_suffix() -> None:
    settings = {"num_tokens": 5, "num_steps": 30, "width": 4, "topk": 64, "stop_at_target": False}
    language_model, batch = chat_model(), text_batch(2)
    buffered = GCG(**settings, buffer_size=1)(language_model, batch, generator())  # type: ignore[arg-type]
    assert buffered.best_loss.isfinite().all()
    plain = GCG(**settings)(language_model, batch, generator())  # type: ignore[arg-type]
    assert not torch.equal(plain.loss_curve, buffered.loss_curve)


def test_reached_behaviours_leave_the_batch() -> None:
    # On the helpful model the plain target is nearly what it says anyway.
    language_model = LanguageModel(load_model(ModelConfig("tinychat:helpful")).eval(), chat=tinychat_format())
    found = GCG(num_tokens=5, num_steps=30, width=32, topk=64)(language_model, text_batch(4), generator())
    done = ~found.loss_curve[-1].isfinite() | (found.loss_curve.isfinite().sum(0) < 31)
    assert done.any()
    first = int(done.nonzero()[0])
    out = language_model.generate(
        language_model.embed(found.prompt_ids[first : first + 1]),
        found.prompt_mask[first : first + 1],
        40,
        [5],
    )
    batch = text_batch(4)
    says = TargetPrefix()
    assert says(batch.prompts[first], language_model.chat.decode(out[0]), batch.targets[first])


def test_gcg_lowers_the_loss_on_every_family() -> None:
    for family in FAMILIES:
        found = GCG(num_tokens=5, num_steps=3, width=16, topk=64)(
            chat_model(family), text_batch(2), generator()
        )
        assert (found.best_loss < found.start_loss).all(), family
        assert not found.zero_gradient.any()


def test_bf16_works_and_a_zero_gradient_is_reported() -> None:
    found = GCG(num_tokens=5, num_steps=2, width=8, topk=16)(
        chat_model(dtype=torch.bfloat16), text_batch(2), generator()
    )
    assert found.best_loss.isfinite().all()
    model = tiny_model(vocab_size=2048, max_position_embeddings=256)
    torch.nn.init.zeros_(model.lm_head.weight)
    dead = GCG(num_tokens=5, num_steps=1, width=4, topk=8)(
        LanguageModel(model, chat=tinychat_format()), text_batch(2), generator()
    )
    assert dead.zero_gradient.all()


def test_gradients_are_needed_and_inference_mode_is_named() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode: false"):
        GCG(num_steps=1)(chat_model(), text_batch(1))


def test_an_observer_sees_every_iterate_and_the_text() -> None:
    seen: list[tuple[float, str]] = []
    with observed(lambda losses, texts: seen.append((losses[0].item(), texts()[0]))):
        found = GCG(num_tokens=5, num_steps=3, width=6, topk=16, stop_at_target=False)(
            chat_model(), text_batch(1), generator()
        )
    assert [loss for loss, _ in seen] == pytest.approx(found.loss_curve[:, 0].tolist())
    assert seen[-1][1] == found.texts[0]


def test_batch_size_is_learned_from_running_out_of_memory() -> None:
    calls: list[int] = []

    def hungry(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError
        return rows * 2

    chunked = Chunked(16)
    assert torch.equal(chunked(hungry, torch.arange(10)), 2 * torch.arange(10))
    assert chunked.max_rows == 2
    assert calls[:3] == [10, 8, 4]
    with pytest.raises(torch.OutOfMemoryError):
        Chunked(1)(lambda rows: hungry(rows.repeat(9)), torch.arange(2))


# --- the benchmark's reference


def test_reference_and_ours_score_candidates_alike() -> None:
    language_model = chat_model()
    batch = text_batch(2)
    assert (
        gcg_benchmark._loss_difference(
            LanguageModel(language_model.module, chat=language_model.chat),
            batch,
            gcg_benchmark._yardstick_behaviours(language_model, batch),
            vocabulary=2048,
        )
        <= 1e-4
    )


def test_sign_flip_test_finds_a_shift_and_no_shift() -> None:
    assert gcg_benchmark.sign_flip_test([0.5] * 12, flips=2000) < 0.01
    assert gcg_benchmark.sign_flip_test([-0.5] * 12, flips=2000) > 0.99
    assert 0.2 < gcg_benchmark.sign_flip_test([0.5, -0.5] * 6, flips=2000) < 0.9
