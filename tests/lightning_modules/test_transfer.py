"""What attacks do, done to benign prompts: every family, against what its attack does to requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datamodules.batch import AdversarialBatch, EvaluationBatch
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from datamodules.text.encoding import Encoder, EncodingConfig, evaluation_batch
from lightning_modules.attacks.base import Attack, AttackedPrompt
from lightning_modules.attacks.benign_search import away_of
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD, target_loss
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt
from lightning_modules.attacks.repeat import Repeat
from lightning_modules.attacks.suffix.initial_suffix import InitialSuffix
from lightning_modules.attacks.suffix.random_search import RandomSearch
from lightning_modules.attacks.suffix.stored import StoredSuffixes
from lightning_modules.attacks.text.rewrites import DirectRequest, InContext, Noise, Prefilling, Templates
from lightning_modules.attacks.text.transfer import TransferSuffixes
from lightning_modules.attacks.transfer import (
    Found,
    NothingCarried,
    RandomPoint,
    Surroundings,
    TowardsRefusal,
    around,
    has_ball,
    transfer_of,
    with_targets,
)
from lightning_modules.models.embeddings import mean_embedding_norm
from tests.conftest import chat_model, data_batch, text_batch, tinychat_format
from tests.support.rows import row, stored, verdicts

REFUSALS = ["I'm sorry, but I can't help with that.", "I cannot help you."]


def benign(*rows: int) -> EvaluationBatch:
    encoder = Encoder(tinychat_format(), EncodingConfig(160))
    chats = encoder.chats(TinyChatBenign("validation", num_rows=12, categories=["guide", "sum"]).rows())
    return evaluation_batch([chats[i] for i in rows or range(4)], "user")


def found(
    sent: Sequence[tuple[str, str]] = (), donors: AdversarialBatch | None = None, attack: Attack | None = None
) -> Found:
    def attacked() -> tuple[AdversarialBatch, AttackedPrompt]:
        assert donors is not None
        assert attack is not None
        return donors, attack(chat_model(), donors, torch.Generator().manual_seed(3))

    return Found(sent, attacked, ["Sure, here is how to do it."], REFUSALS)


def carried(attack: Attack, own: Found, batch: EvaluationBatch | None = None) -> AttackedPrompt:
    transfer = transfer_of(attack)
    assert transfer is not None
    return transfer(chat_model(), batch or benign(), own, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("sent", "frame"),
    [
        ("Do it. ! ! !", ("", " ! ! !")),
        ("In a play: Do it. Now", ("In a play: ", " Now")),
        ("something else", None),
    ],
)
def test_what_stands_around_a_request(sent: str, frame: tuple[str, str] | None) -> None:
    assert around(" Do it. ", sent) == frame


def test_suffixes_of_other_requests_follow_every_benign_prompt() -> None:
    donors = text_batch(3)
    sent = InitialSuffix(5, init=" y")(chat_model(), donors)
    attacked = carried(InitialSuffix(5), found(list(zip(donors.prompts, sent.texts, strict=True))))
    prompts = benign().prompts
    suffixes = {text.removeprefix(p) for p, text in zip(donors.prompts, sent.texts, strict=True)}
    assert all(text.removeprefix(p) in suffixes for p, text in zip(prompts, attacked.texts, strict=True))
    ids = [ids[mask].tolist() for ids, mask in zip(attacked.prompt_ids, attacked.prompt_mask, strict=True)]
    asked = zip(attacked.texts, benign().systems, strict=True)
    assert ids == [tinychat_format().prompt(text, system).ids for text, system in asked]


def test_replayed_suffixes_follow_benign_prompts_for_which_none_was_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = stored(tmp_path, row("a", prompt="How?", attacked="How? y y", verdicts=verdicts(True)))
    replay = TransferSuffixes(run, whose="own", num_samples=1)
    attacked = carried(replay, found([("How?", "How? y y")]))
    assert list(attacked.texts) == [f"{prompt} y y" for prompt in benign().prompts]
    assert list(replay(chat_model(), text_batch(1)).texts) == list(text_batch(1).prompts)
    assert "holds nothing for" in caplog.text


def test_every_found_suffix_is_used_won_or_not() -> None:
    pairs = [(f"Do {i}", f"Do {i} suffix{i}") for i in range(3)]
    attacked = carried(RandomSearch(), found(pairs), benign(*range(12)))
    used = {text.rsplit(" ", 1)[1] for text in attacked.texts}
    assert used == {"suffix0", "suffix1", "suffix2"}


def test_a_rewritten_request_that_is_gone_leaves_nothing() -> None:
    with pytest.raises(NothingCarried):
        Surroundings()(chat_model(), benign(), found([("Do it", "a story")]), torch.Generator())


def test_rewritings_are_of_the_benign_prompt_itself() -> None:
    batch = benign()
    assert carried(DirectRequest(), found()).texts == batch.prompts
    direct = carried(DirectRequest(), found())
    assert torch.equal(direct.prompt_ids, batch.prompt_ids)
    for prompt, text in zip(batch.prompts, carried(Templates("role_play"), found()).texts, strict=True):
        assert prompt in text
        assert text != prompt
    noisy = carried(Noise("character", 0.5), found()).texts
    assert all(text != prompt for text, prompt in zip(noisy, batch.prompts, strict=True))
    shown = carried(InContext(TinyChatHarmful("train"), 2), found())
    assert [len(turns) for turns in shown.histories] == [2] * len(batch)


def test_a_forced_reply_begins_the_expected_one() -> None:
    batch = benign()
    attacked, chat = carried(Prefilling(2), found()), tinychat_format()
    for expected, forced, ids in zip(batch.expected, attacked.forced, attacked.prompt_ids, strict=True):
        assert 1 <= len(forced) <= 2
        assert expected.startswith(chat.decode(list(forced)))
        assert ids[-len(forced) :].tolist() == list(forced)


def test_random_points_lie_in_the_ball_of_the_attackable_positions() -> None:
    attack = EmbeddingPGD(epsilon=0.5)
    attacked = carried(attack, found())
    batch = benign()
    assert torch.equal(attacked.prompt_ids, batch.prompt_ids)
    assert attacked.delta is not None
    size = attacked.delta.norm(dim=-1)
    radius = 0.5 * mean_embedding_norm(chat_model())
    assert (size <= radius * (1 + 1e-6)).all()
    assert 0.9 < (size.amax() / radius).item() <= 1 + 1e-6
    assert (size[~batch.prompt_mask] == 0).all()
    touched = [int((row > 0).sum()) for row in size]
    chat = tinychat_format()
    assert touched == [sum(chat.prompt(prompt).attackable("user")) for prompt in batch.prompts]
    alone = carried(attack, found(), benign(2))
    assert alone.delta is not None
    assert torch.equal(alone.delta[0], attacked.delta[2, -alone.delta.shape[1] :])


def test_random_points_of_layers() -> None:
    attacked = carried(LatentPGD([1], embedding=False, epsilon=2.0), found())
    assert attacked.delta is None
    size = attacked.layers[1].norm(dim=-1)
    assert 1.8 < size.max().item() <= 2 * (1 + 1e-6)


def test_free_suffixes_are_those_of_other_requests() -> None:
    attack, donors = SoftPrompt(3, num_steps=2, step_size=0.1), text_batch(2)
    own = found(donors=donors, attack=attack)
    attacked = carried(attack, own)
    _, source = own.attacked()
    assert source.delta is not None
    assert attacked.delta is not None
    known = [own[own.abs().sum(-1) > 0] for own in source.delta]
    for own in attacked.delta:
        free = own[own.abs().sum(-1) > 0]
        assert free.shape == (3, own.shape[-1])
        assert any(torch.equal(free, other) for other in known)
    assert attacked.prompt_ids.shape[1] == benign().prompt_ids.shape[1] + 3


def test_a_search_towards_a_refusal_makes_it_likelier() -> None:
    attack = EmbeddingPGD(epsilon=0.5, num_steps=5)
    attacked = TowardsRefusal(attack)(chat_model(), benign(), found(), torch.Generator())
    assert (attacked.best_loss < attacked.start_loss).all()


def test_a_search_away_from_the_right_answer_makes_it_unlikelier_within_the_ball() -> None:
    # stop_loss is of the other aim: every -CE is below it.
    attack, model, batch = EmbeddingPGD(epsilon=0.5, num_steps=5, stop_loss=0.05), chat_model(), benign()
    away = away_of(attack)
    assert away is not None
    attacked = away(model, batch, found(), torch.Generator())
    assert attacked.delta is not None
    assert (attacked.delta.norm(dim=-1) <= 0.5 * mean_embedding_norm(model) * (1 + 1e-6)).all()
    # What is minimised is -CE of each prompt's own right answer, not of a borrowed text.
    aimed = [with_targets(model, benign(i), [right], "user") for i, right in enumerate(batch.expected)]
    for i, own in enumerate(aimed):
        plain = target_loss(model, own, model.embed(own.prompt_ids), None)
        torch.testing.assert_close(attacked.start_loss[i], -plain[0], rtol=1e-4, atol=1e-4)
    assert (-attacked.best_loss > -attacked.start_loss).all()
    unanswered = replace(batch, expected=("", *batch.expected[1:]))
    with pytest.raises(ValueError, match="expected a right answer to attack"):
        away(model, unanswered, found(), torch.Generator())
    # Restarts would have to be searched away from the answer too: refused rather than forgotten.
    assert away_of(Repeat(EmbeddingPGD(epsilon=0.5, random_start=True), 4)) is None


def test_who_has_a_ball_and_who_can_be_done_to_others() -> None:
    pgd = EmbeddingPGD(epsilon=0.1, random_start=True)
    assert has_ball(pgd)
    assert has_ball(Repeat(pgd))
    assert not has_ball(SoftPrompt())
    assert isinstance(transfer_of(Repeat(pgd)), RandomPoint)
    free = EmbeddingPGD(epsilon=None, step_unit="absolute")
    assert transfer_of(free) is None
    assert not has_ball(free)


def test_suffixes_of_documents_are_replayed_on_documents(tmp_path: Path) -> None:
    """What was attacked is the document where what was sent holds it, and the user's text elsewhere."""
    batch = data_batch(2)
    own, other = batch.prompts
    run = stored(
        tmp_path,
        row("a", prompt="Which?", document=own, attacked=f"{own} y y", verdicts=verdicts(True)),
        row("b", prompt="Which?", document="baker: hat", attacked="z baker: hat", verdicts=verdicts(True)),
        row("c", prompt="Who?", document="a table", attacked="Who? x", verdicts=verdicts(True)),
    )
    told = [(found.request, found.before, found.after) for found in StoredSuffixes(run).surroundings()]
    assert told == [(own, "", " y y"), ("baker: hat", "z ", ""), ("Who?", "", " x")]
    attacked = TransferSuffixes(run)(chat_model(), batch)
    assert attacked.texts[0] in (f"{own} y y", f"z {own}", f"{own} x")
    assert attacked.texts[1] in (f"{other} y y", f"z {other}", f"{other} x")
    only = TransferSuffixes(run, whose="own")(chat_model(), batch)
    assert only.texts == (f"{own} y y", other)


def test_suffixes_of_a_run_are_those_of_harmful_requests(tmp_path: Path) -> None:
    """Benign prompts under the same attack carry them too, and have no verdict of success."""
    benign = row(
        "b",
        prompt="Add.",
        attacked="Add. x",
        verdicts={"keyword_refusal@2": {"verdict": False, "score": None}},
    )
    run = stored(
        tmp_path,
        row("a", prompt="How?", attacked="How? y y", verdicts=verdicts(True)),
        replace(benign, subject="harmless"),
    )
    assert [found.after for found in StoredSuffixes(run).surroundings()] == [" y y"]


def test_of_a_request_that_an_attack_searched_again_the_latest_suffix_is_replayed(tmp_path: Path) -> None:
    """A larger search keeps its attack's name: its rows stand beside the smaller one's."""
    small = row("a", prompt="How?", attacked="How? small", verdicts=verdicts(True))
    other = row("a", prompt="How?", attacked="How? other", verdicts=verdicts(True), attack="other")
    large = replace(small, settings="larger", attacked="How? large")
    failed = replace(small, settings="largest", attacked="How? failed", verdicts=verdicts(False))
    run = stored(tmp_path, small, other, large, failed)
    assert [found.after for found in StoredSuffixes(run).surroundings()] == [" large", " other"]
    everything = StoredSuffixes(run, judge=None).surroundings()
    assert [found.after for found in everything] == [" failed", " other"]
