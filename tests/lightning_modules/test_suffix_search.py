"""What suffix searches stand on: slots, what can be typed, losses of candidates, gradients of swaps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import one_hot

from datamodules.text.chat_format import ChatFormat
from datamodules.text.envelope import Envelope
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from experiments.benchmarks.rows import LLAMA2_TEMPLATE
from lightning_modules.attacks.suffix.gcg import draw_swaps
from lightning_modules.attacks.suffix.slots import make_slot, replayable, typable_tokens, without_end_of_turn
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.embeddings import embedding_table, embedding_weight
from lightning_modules.models.likelihood import mellowmax
from lightning_modules.models.logits import replies_greedily
from lightning_modules.models.reply import Reply
from tests.conftest import FAMILIES, chat_model, text_batch, tinychat_format
from tests.support.suffix_search import generator, plain_losses, search_of


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
