"""Token searches in detail: suffix slots, cached prefixes, one-hot gradients, and GCG's options, each against
a plain computation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot

from callbacks.judges.exact import TargetPrefix
from datamodules.text.chat_format import ChatFormat
from datamodules.text.envelope import Envelope
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from experiments.benchmarks import gcg as gcg_benchmark
from experiments.benchmarks import gcg_yardstick
from experiments.benchmarks.rows import LLAMA2_TEMPLATE
from lightning_modules.attacks.chunks import Chunked
from lightning_modules.attacks.progress import observed
from lightning_modules.attacks.suffix.gcg import GCG, draw_swaps
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.attacks.suffix.slots import make_slot, replayable, typable_tokens, without_end_of_turn
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.embeddings import embedding_table, embedding_weight
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mellowmax
from lightning_modules.models.loading import ModelConfig, load_model
from lightning_modules.models.logits import replies_greedily
from lightning_modules.models.reply import Reply
from tests.conftest import FAMILIES, chat_model, text_batch, tiny_model, tinychat_format


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def search_of(
    language_model: LanguageModel, size: int = 3, num_tokens: int = 5, **settings: int
) -> SuffixSearch:
    return SuffixSearch(language_model, text_batch(size), num_tokens, " x", 512, **settings)


def plain_losses(
    language_model: LanguageModel, search: SuffixSearch, row: int, suffix: list[int]
) -> torch.Tensor:
    """Token losses of one candidate from the whole prompt, without any cache."""
    ids = torch.tensor([search.slots[row].ids(suffix)])
    reply = Reply(search.target.ids[row : row + 1], search.target.mask[row : row + 1])
    (scores,) = language_model.reply_log_probs(
        language_model.embed(ids), torch.ones_like(ids, dtype=torch.bool), reply
    )
    return -scores[0].detach()


# --- slots


@pytest.mark.parametrize("name", ["tinychat", "llama2", "phi3"])
@pytest.mark.parametrize(
    "prompt", ["How do I bake bread?", "Schreibe über Öl – 日本 🙂", "a", "Ends with an x"]
)
def test_a_slot_holds_the_suffix_and_its_text_gives_back_its_ids(
    name: str, prompt: str, public_data: Path
) -> None:
    folder = public_data / "models" / "tokenizers"
    chat = {
        "tinychat": lambda: tinychat_format(),
        "llama2": lambda: ChatFormat(
            load_tokenizer(TokenizerConfig(str(folder / "llama2"), chat_template=LLAMA2_TEMPLATE))
        ),
        "phi3": lambda: ChatFormat(load_tokenizer(TokenizerConfig(str(folder / "phi3-mini")))),
    }[name]()
    slot = make_slot(chat, prompt, Envelope(), " x", 20)
    assert len(slot.suffix) == 20
    (text,) = replayable(chat, [slot], [slot.suffix])
    assert text is not None
    assert not text.replace(" x", "")
    assert chat.prompt(prompt + text, None).ids == slot.ids(slot.suffix)
    allowed = typable_tokens(chat, len(chat.tokenizer), ascii_only=True)
    drawn = draw_swaps(
        torch.tensor(slot.suffix), allowed.nonzero().squeeze(1).repeat(20, 1), 64, 2, generator()
    ).tolist()
    texts = replayable(chat, [slot] * 64, drawn)
    assert sum(own is not None for own in texts) > 8
    for suffix, own in zip(drawn, texts, strict=True):
        typed = None if own is None else chat.prompt(prompt + own, None).ids
        assert typed == (None if own is None else slot.ids(suffix))


def test_what_cannot_be_typed_is_told_apart() -> None:
    chat = tinychat_format()
    slot = make_slot(chat, "How do I bake bread?", Envelope(), " x", 3)
    merged = chat.tokenizer(" the", add_special_tokens=False)["input_ids"]
    letters = [chat.tokenizer.convert_tokens_to_ids(c) for c in ("Ġ", "t", "he")]
    if len(merged) == 1 and all(letters):
        assert replayable(chat, [slot], [letters]) == [
            None
        ]  # typed, these three letters would merge into one token
    space = chat.tokenizer.convert_tokens_to_ids("Ġ")
    assert replayable(chat, [slot], [[*slot.suffix[:2], space]]) == [None]  # ends in white space


def test_typable_tokens_leave_out_special_and_unprintable_ones() -> None:
    chat = tinychat_format()
    allowed = typable_tokens(chat, 1100, ascii_only=True)
    assert allowed.shape == (1100,)
    assert not allowed[len(chat.tokenizer) :].any()
    assert not allowed[chat.tokenizer.all_special_ids].any()
    assert all(chat.decode_batch([[i]])[0].isprintable() for i in allowed.nonzero().squeeze(1).tolist())
    assert typable_tokens(chat, 1100, ascii_only=False).sum() > allowed.sum()


def test_end_of_turn_leaves_the_target_but_token_0_stays() -> None:
    # Trap: `target_ids > 0` as a mask. Token id 0 is a real token.
    ids, mask = (
        torch.tensor([[7, 0, 5, 0], [5, 5, 5, 5]]),
        torch.tensor([[True, True, True, False], [True] * 4]),
    )
    assert without_end_of_turn(ids, mask, [5]).tolist() == [
        [True, True, False, False],
        [True, True, True, False],
    ]
    assert without_end_of_turn(ids, mask, []) is mask
    assert without_end_of_turn(ids[1:, :1], mask[1:, :1], [5]).all()


# --- the search's numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_losses_equal_those_of_the_whole_prompt(family: str) -> None:
    # Gemma-2's eager attention takes its softmax in fp32 whatever the model's dtype.
    tolerance = 1e-7 if family == "gemma2" else 1e-9
    language_model = chat_model(family, torch.float64)
    for settings in ({}, {"lead": 1}, {"target_tokens": 2}):
        search = search_of(language_model, **settings)
        rows = torch.tensor([0, 2, 1, 2])
        drawn = torch.randint(10, 1000, (4, 7), generator=generator())
        found = search.losses(rows, drawn)
        for i, row in enumerate(rows.tolist()):
            torch.testing.assert_close(
                found[i],
                plain_losses(language_model, search, row, drawn[i].tolist()),
                atol=tolerance,
                rtol=tolerance,
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_starting_at_the_first_change_changes_no_loss(family: str) -> None:
    language_model = chat_model(family, torch.float64)
    search = search_of(language_model)
    search.chunked.max_rows = 3
    base = torch.randint(10, 1000, (2, 5), generator=generator())
    rows = torch.tensor([2, 0, 0, 2, 2, 0, 2])
    candidates = base[(rows == 2).long()].clone()
    for i, position in enumerate((4, 0, 3, 1, 1, 4, 2)):
        candidates[i, position] = 7 + i
    candidates[6] = base[1]  # nothing changed
    found, _ = search.scores_of_changes(rows, candidates, [0, 2], base)
    torch.testing.assert_close(found, search.losses(rows, candidates), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_hot_gradient_equals_that_of_explicit_one_hot_coordinates(family: str) -> None:
    # Trap: one-hot times the weight is wrong where the embedding module scales (Gemma): the scale is written
    # out here.
    language_model = chat_model(family, torch.float64)
    search = search_of(language_model, size=2)
    _, gradient = search.gradient(
        torch.arange(2), search.start, lambda losses, mask: search.mean(torch.arange(2), losses)
    )
    slopes = gradient @ embedding_table(language_model).T
    scale = 32**0.5 if family.startswith("gemma") else 1.0
    weight = embedding_weight(language_model).detach()
    for row, slot in enumerate(search.slots):
        coordinates = one_hot(torch.tensor(slot.suffix), 2048).double().requires_grad_()
        ends = [language_model.embed(torch.tensor([ids])).detach() for ids in (slot.before, slot.after)]
        embeds = torch.cat([ends[0], scale * (coordinates @ weight)[None], ends[1]], dim=1)
        reply = Reply(search.target.ids[row : row + 1], search.target.mask[row : row + 1])
        (scores,) = language_model.reply_log_probs(
            embeds, torch.ones(embeds.shape[:2], dtype=torch.bool), reply
        )
        (expected,) = torch.autograd.grad(-scores.sum() / reply.mask.sum(), coordinates)
        torch.testing.assert_close(slopes[row], expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_next_token_logits_are_the_whole_prompt_s(family: str) -> None:
    language_model = chat_model(family, torch.float64)
    search = search_of(language_model, lead=1)
    for suffixes in (torch.zeros(3, 0, dtype=torch.long), torch.tensor([[5, 9], [11, 3], [100, 200]])):
        logits = search.next_token_logits(torch.arange(3), suffixes)
        for row in range(3):
            ids = torch.tensor([search.slots[row].before + suffixes[row].tolist()])
            torch.testing.assert_close(
                logits[row], causal_lm(language_model.module)(ids).logits[0, -1].float(), atol=1e-5, rtol=1e-5
            )


def test_greedy_replies_are_recognised() -> None:
    language_model, batch = chat_model(), text_batch(3)
    out = language_model.generate(language_model.embed(batch.prompt_ids), batch.prompt_mask, 4, [5])
    ids = torch.tensor([row + [0] * (4 - len(row)) for row in out])
    mask = torch.tensor([[i < len(row) for i in range(4)] for row in out])
    embeds = language_model.embed(batch.prompt_ids)
    assert replies_greedily(language_model, embeds, batch.prompt_mask, Reply(ids, mask)).all()
    ids[1, 0] = (ids[1, 0] + 1) % 1000
    assert replies_greedily(language_model, embeds, batch.prompt_mask, Reply(ids, mask)).tolist() == [
        True,
        False,
        True,
    ]


def test_mellowmax_lies_between_mean_and_maximum() -> None:
    # mm_1(0, ln 3) = ln((1 + 3) / 2) = ln 2; the masked third loss does not count.
    losses, mask = torch.tensor([[0.0, 3.0**0.5, 50.0]]), torch.tensor([[True, True, False]])
    known = mellowmax(torch.tensor([[0.0, 1.0986122886681098, 50.0]]), mask, 1.0)
    torch.testing.assert_close(known, torch.tensor([0.6931471805599453]))
    assert (
        losses[0, :2].mean()
        < mellowmax(losses, mask, 0.5)
        < mellowmax(losses, mask, 5.0)
        < losses[0, :2].max()
    )


# --- GCG


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
