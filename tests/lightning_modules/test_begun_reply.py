"""Replies that have begun harmfully: begun as often and as far as is said, and scored as their text is."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.attacks.base import Attack, NoAttack
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.text.rewrites import Prefilling
from lightning_modules.attacks.training.begun_reply import BegunReply
from lightning_modules.losses.base import ReferenceScores
from lightning_modules.models.begun import remaining
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.reply import Reply
from lightning_modules.scoring import score_replies
from tests.conftest import chat_model, ragged_batch, text_batch, tiny_model

PGD = EmbeddingPGD(epsilon=0.2, num_steps=2)


def rng(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("perturbed", [False, True])
def test_a_begun_reply_is_scored_as_its_text_is(perturbed: bool) -> None:
    """Both replies behind the begun one, against every row by itself: prompt, begun tokens, reply."""
    model, batch = LanguageModel(tiny_model(dtype=torch.float64)), ragged_batch()
    inner: Attack = PGD if perturbed else NoAttack()
    attacked = BegunReply(inner, longest=3, probability=0.7)(model, batch, rng())
    counts = [len(own) for own in attacked.forced]
    assert len(set(counts)) > 1
    scores = score_replies(model, batch, attacked)
    clean = inner(model, batch, rng())
    for i, count in enumerate(counts):
        begun = batch.harmful_ids[i : i + 1, :count]
        assert attacked.forced[i] == tuple(begun[0].tolist())
        width = int(batch.prompt_mask[i].sum())
        embeds = clean.embeds(model)[i : i + 1, -width:]
        embeds = torch.cat([embeds, model.embed(begun)], dim=1)
        mask = torch.ones(1, embeds.shape[1], dtype=torch.bool)
        safe = batch.safe_ids[i, batch.safe_mask[i]][None]
        rest = batch.harmful_ids[i, batch.harmful_mask[i]][None, count:]
        replies = (Reply(own, torch.ones_like(own, dtype=torch.bool)) for own in (safe, rest))
        expected = model.reply_log_probs(embeds, mask, *replies)
        for found, own in zip((scores.safe_log_probs, scores.harmful_log_probs), expected, strict=True):
            torch.testing.assert_close(found[i, : own.shape[1]], own[0], atol=1e-9, rtol=0)
            assert not found[i, own.shape[1] :].any()
        assert int(scores.harmful_mask[i].sum()) == rest.shape[1]


def test_replies_are_begun_as_often_and_as_far_as_is_said() -> None:
    model = LanguageModel(tiny_model())
    begun: list[int] = []
    for seed in range(100):
        batch = ragged_batch()
        forced = BegunReply(NoAttack(), longest=2, probability=0.5)(model, batch, rng(seed)).forced
        begun += [len(own) for own in forced] or [0] * len(batch)
    shares = [begun.count(count) / len(begun) for count in range(4)]
    assert shares[0] == pytest.approx(0.5, abs=0.09)
    assert shares[1] == pytest.approx(0.25, abs=0.08) and shares[2] == pytest.approx(0.25, abs=0.08)
    assert shares[3] == 0


def test_a_target_is_never_begun_whole() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    for seed in range(20):
        attacked = BegunReply(NoAttack(), longest=1000, probability=1.0)(model, batch, rng(seed))
        lengths = batch.harmful_mask.sum(1).tolist()
        assert all(0 < len(own) < length for own, length in zip(attacked.forced, lengths, strict=True))
        assert score_replies(model, batch, attacked).harmful_mask.any(1).all()


def test_nothing_is_begun_twice_or_beside_a_reference() -> None:
    model, batch = chat_model(), text_batch(2)
    with pytest.raises(ValueError, match=r"BegunReply\.attack: expected an attack that begins no reply"):
        BegunReply(Prefilling(2))(model, batch, rng())
    attacked = BegunReply(NoAttack(), longest=1, probability=1.0)(model, batch, rng())
    with pytest.raises(ValueError, match=r"model\.attack: .* objective with a reference"):
        score_replies(model, batch, attacked, ReferenceScores(torch.zeros(2), torch.zeros(2)))


def test_what_remains_of_a_reply_by_hand() -> None:
    reply = Reply(
        torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool(), (4, 2)
    )
    left = remaining(reply, [(5, 6, 7), ()])
    assert left.ids.tolist() == [[8, 0, 0, 0], [9, 4, 0, 0]]
    assert left.mask.tolist() == [[True, False, False, False], [True, True, False, False]]
    assert left.lengths == (1, 2)
    assert remaining(reply, [(), ()]) is reply and remaining(reply, ()) is reply
