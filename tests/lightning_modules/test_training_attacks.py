"""Attacks that live with training: pools, generators and combinations; what they keep is saved and given
back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from callbacks.judges.exact import TargetPrefix
from datamodules.batch import AdversarialBatch
from datamodules.overlap import EvaluatedTexts
from datamodules.rows import HarmfulRow, RowProblem
from datamodules.sources.replay import RedTeamReplay
from datamodules.sources.tinychat.sources import TinyChatHarmful
from lightning_modules.attacks.base import Attack, NoAttack, example_rngs, load_attack_state, state_of
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.text.choosers import FirstSuccess
from lightning_modules.attacks.text.rewrites import BestOfN, DirectRequest, Noise, Prefilling, Templates
from lightning_modules.attacks.text.templates import fill, read_templates
from lightning_modules.attacks.training.gaussian_noise import GaussianNoise
from lightning_modules.attacks.training.mixture import Mixture
from lightning_modules.attacks.training.rewrite_then_perturb import RewriteThenPerturb
from lightning_modules.models.embeddings import mean_embedding_norm
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy, unlikelihood
from lightning_modules.models.loading import ModelConfig, load_seeded
from lightning_modules.models.reply import Reply
from tests.conftest import chat_model, ragged_batch, text_batch, tiny_model, tinychat_format
from tests.support.attacks import CASES, persistent, suffix_generator
from tests.support.rows import row, stored, verdicts

PGD = EmbeddingPGD(epsilon=0.2, num_steps=2)


def rng(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


STATEFUL = [name for name, case in CASES.items() if case.stateful]


@pytest.mark.parametrize("name", STATEFUL)
def test_state_survives_a_checkpoint_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, batch = chat_model(), text_batch(2)
    whole, first, second = (CASES[name].build() for _ in range(3))
    for attack in (whole, first):
        attack(model, batch, rng(1))
    torch.save(state_of(first), tmp_path / "attack.pt")
    load_attack_state(second, torch.load(tmp_path / "attack.pt", weights_only=True))
    # Saved again before it is used, it is still what it was.
    torch.save(state_of(second), tmp_path / "again.pt")
    load_attack_state(second, torch.load(tmp_path / "again.pt", weights_only=True))
    for seed in (2, 3):
        results = [attack(model, batch, rng(seed)) for attack in (whole, second)]
        assert torch.equal(results[0].prompt_ids, results[1].prompt_ids)
        torch.testing.assert_close(
            results[0].loss_curve, results[1].loss_curve, atol=0, rtol=0, equal_nan=True
        )


@pytest.mark.parametrize("name", STATEFUL)
def test_a_second_visit_leaves_the_model_as_it_was(name: str) -> None:
    model = chat_model()
    model.module.train()
    for i, p in enumerate(model.module.parameters()):
        p.requires_grad_(i % 2 == 0)
        p.grad = torch.ones_like(p) if i % 4 == 0 else None
    before, attack = copy.deepcopy(model.module), CASES[name].build()
    for seed in (1, 2):
        attack(model, text_batch(2), rng(seed))
    for i, (p, q) in enumerate(zip(model.module.parameters(), before.parameters(), strict=True)):
        assert torch.equal(p, q)
        assert p.requires_grad == q.requires_grad
        assert bool((p.grad == 1).all()) if i % 4 == 0 else p.grad is None  # type: ignore[union-attr]
    assert all(module.training for module in model.module.modules())


def test_attacks_without_a_state_need_none_and_a_mismatch_is_refused() -> None:
    assert state_of(NoAttack()) is None
    load_attack_state(NoAttack(), None)
    with pytest.raises(ValueError, match="the checkpoint does not fit the attack PersistentGCG"):
        load_attack_state(persistent(), None)


# --- R2D2's pool


def test_each_visit_goes_on_from_the_last_suffix() -> None:
    model, attack, batch = chat_model(), persistent(), text_batch(2)
    first = attack(model, batch, rng(1))
    second = attack(model, batch, rng(2))
    torch.testing.assert_close(second.loss_curve[0], first.best_loss, atol=2e-6, rtol=1e-5)
    assert (second.best_loss <= first.best_loss).all()
    fresh = attack(model, text_batch(2, start=2), rng(3))
    assert fresh.loss_curve[0] == pytest.approx(
        persistent()(model, text_batch(2, start=2), rng(4)).loss_curve[0]
    )


def test_a_reset_forgets_its_share() -> None:
    model, batch = chat_model(), text_batch(3)
    everything = persistent(reset_fraction=1.0, reset_every=1)
    first = everything(model, batch, rng(1))
    torch.testing.assert_close(everything(model, batch, rng(2)).loss_curve[0], first.loss_curve[0])
    attack = persistent(reset_fraction=0.2, reset_every=1)
    attack.load_state_dict({"ranks": [{"pool": {i: [0, [5, 5, 5, 5]] for i in range(500)}, "visits": 1}]})
    attack(model, batch, rng(6))
    assert 360 <= len(attack.state_dict()["ranks"][0]["pool"]) - len(batch) <= 440


# --- MixAT's combination


def test_rewritten_prompts_are_the_ones_attacked() -> None:
    model, batch = chat_model(), text_batch(4)
    chat, template = tinychat_format(), read_templates("role_play")[0]
    attacked = RewriteThenPerturb(Templates("role_play", limit=1), PGD, probability=1.0)(model, batch, rng())
    assert attacked.delta is not None
    for i in range(len(batch)):
        tokens = chat.prompt(fill(template, batch.prompts[i], batch.targets[i]), None)
        assert attacked.prompt_ids[i][attacked.prompt_mask[i]].tolist() == tokens.ids
        moved = attacked.delta[i].abs().sum(-1)[attacked.prompt_mask[i]] > 0
        assert moved.tolist() == tokens.attackable("user")
    # One pass to score the one template, three to descend two steps and look at the last.
    assert attacked.forward_passes.tolist() == [4] * 4
    assert attacked.backward_passes.tolist() == [2] * 4


def test_the_queries_of_a_rewrite_are_counted() -> None:
    rewrite = BestOfN(num_samples=3, chooser=FirstSuccess(TargetPrefix(), max_new_tokens=2))
    attacked = RewriteThenPerturb(rewrite, PGD, probability=1.0)(chat_model(), text_batch(2), rng())
    assert attacked.queries is not None
    assert attacked.queries.tolist() == [3, 3]


def test_probability_decides_per_example_whatever_the_batch() -> None:
    model = chat_model()
    attack = RewriteThenPerturb(Templates("role_play", limit=1), PGD, probability=0.5)
    together = attack(model, text_batch(8), rng(3))
    lengths = together.prompt_mask.sum(1).tolist()
    plain = text_batch(8).prompt_mask.sum(1).tolist()
    changed = [length != own for length, own in zip(lengths, plain, strict=True)]
    assert 1 <= sum(changed) <= 7
    for i in range(8):
        alone = attack(model, text_batch(1, start=i), rng(3))
        assert int(alone.prompt_mask.sum()) == lengths[i]


def test_what_cannot_be_typed_is_no_rewrite() -> None:
    with pytest.raises(ValueError, match="expected an attack whose result a user can type, got Prefilling"):
        RewriteThenPerturb(Prefilling(2), PGD, probability=1.0)(chat_model(), text_batch(2), rng())
    with pytest.raises(ValueError, match="got EmbeddingPGD"):
        RewriteThenPerturb(PGD, PGD, probability=1.0)(chat_model(), text_batch(2), rng())
    with pytest.raises(ValueError, match=r"probability: expected a number within \(0, 1\], got 0"):
        RewriteThenPerturb(DirectRequest(), PGD, probability=0.0)


# --- the generator


def test_the_generator_learns_to_write_what_was_found() -> None:
    model, attack, batch = (
        LanguageModel(load_seeded(ModelConfig("tinychat:aligned"), 0), chat=tinychat_format()),
        suffix_generator(),
        text_batch(4),
    )
    model.module.eval()
    attack.updates = 0
    attacked = attack(model, batch, rng(1))
    assert (attacked.best_loss <= attacked.start_loss).all()
    assert all(text.startswith(prompt) for text, prompt in zip(attacked.texts, batch.prompts, strict=True))

    def loss() -> float:
        writer, pairs = attack._loaded(model), attack._buffer
        total = 0.0
        for prompt, suffix in pairs:
            ids, reply = (
                torch.tensor([prompt]),
                Reply(torch.tensor([suffix]), torch.ones(1, len(suffix), dtype=torch.bool)),
            )
            (scores,) = writer.reply_log_probs(
                writer.embed(ids), torch.ones_like(ids, dtype=torch.bool), reply
            )
            total += mean_cross_entropy(scores, reply.mask).item()
        return total / len(pairs)

    before = loss()
    attack.updates = 10
    attack._learn(attack._loaded(model), rng(2))
    assert loss() < 0.8 * before


def test_a_generator_of_another_vocabulary_is_refused() -> None:
    small = LanguageModel(tiny_model(), chat=tinychat_format())
    with pytest.raises(ValueError, match="expected the model's vocabulary of 97 tokens, got 2048"):
        suffix_generator()(small, text_batch(1), rng())


# --- LAT's adversary


def test_the_latent_adversary_also_pushes_away_from_the_safe_reply() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    attacked = LatentPGD(
        layers=[0], epsilon=0.5, radius_unit="embedding_norm", num_steps=3, weight_safe=0.25
    )(model, batch)
    replies = Reply(batch.harmful_ids, batch.harmful_mask), Reply(batch.safe_ids, batch.safe_mask)
    harmful, safe = model.reply_log_probs(model.embed(batch.prompt_ids), batch.prompt_mask, *replies)
    expected = 0.75 * mean_cross_entropy(harmful, replies[0].mask) + 0.25 * unlikelihood(
        safe, replies[1].mask
    )
    torch.testing.assert_close(attacked.loss_curve[0], expected.detach())
    assert (attacked.best_loss < attacked.start_loss).all()
    # Two replies are two passes: four iterates seen, three of them differentiated.
    assert attacked.forward_passes.tolist() == [8] * len(batch)
    assert attacked.backward_passes.tolist() == [6] * len(batch)


# --- red-team replay


def test_replay_takes_successes_that_can_be_typed(tmp_path: Path) -> None:
    run = stored(
        tmp_path / "run",
        row("won", prompt="p1", attacked="p1 x x", verdicts=verdicts(True)),
        row(
            "lost",
            prompt="p2",
            attacked="p2 x x",
            verdicts=verdicts(False),
            forward_passes=7,
            backward_passes=4,
        ),
        row("embedding", attacked=None, verdicts=verdicts(True)),
        row("forced", attacked="p3", prefill="Sure", verdicts=verdicts(True)),
        row("turns", attacked="p4", history=[["q", "a"]], verdicts=verdicts(True)),
        row("judged again", prompt="p5", attacked="p5 x", verdicts=verdicts(False)),
        row("judged again", prompt="p5", attacked="p5 x", verdicts=verdicts(True)),
        row(
            "beast", attack="beast", prompt="p6", attacked="p6 y", verdicts=verdicts(True), forward_passes=100
        ),
        row("benign", subject="harmless", prompt="b", attacked="b x x", forward_passes=1000),
    )
    # What lost has cost too, and each of the seven replies; benign prompts under an attack are measured, not
    # collected.
    assert RedTeamReplay(run).collecting_passes == 7 + 4 + 100 + 7
    assert RedTeamReplay(run, attacks=["beast"]).collecting_passes == 100 + 1
    found = [r for r in RedTeamReplay(run, "No.").rows() if isinstance(r, HarmfulRow)]
    assert [(r.prompt, r.origin, r.safe_reply, r.target) for r in found] == [
        ("p1 x x", "p1", "No.", "t"), ("p5 x", "p5", "No.", "t"), ("p6 y", "p6", "No.", "t"),
    ]  # fmt: skip
    assert len({r.key for r in found}) == 3
    assert [r.prompt for r in RedTeamReplay(run, attacks=["beast"]).rows() if isinstance(r, HarmfulRow)] == [
        "p6 y"
    ]
    assert len(list(RedTeamReplay(run, judge="keyword_refusal").rows())) == 1
    # Whether a document was attacked or the text before it, a row does not say: nothing to learn from.
    beside = row("d", prompt="p7", document="a list", attacked="a list x", verdicts=verdicts(True))
    (bad,) = RedTeamReplay(stored(tmp_path / "documents", beside)).rows()
    assert isinstance(bad, RowProblem) and "asked beside a document" in bad.reason
    for wrong, message in (
        (RedTeamReplay(run, attacks=["pair"]), "did not run in"),
        (RedTeamReplay(run, judge="gpt"), "no verdict of 'gpt'"),
    ):
        with pytest.raises(ValueError, match=message):
            list(wrong.rows())
    with pytest.raises(ValueError, match="attack the training requests first"):
        list(RedTeamReplay(str(tmp_path)).rows())


def test_replaying_an_evaluation_request_is_an_overlap(tmp_path: Path) -> None:
    # Trap: training on an evaluation set; with a suffix behind it the prompt's own text no longer gives that
    # away.
    held_out = next(r for r in TinyChatHarmful("validation").rows() if isinstance(r, HarmfulRow))
    run = stored(
        tmp_path / "run",
        row(prompt=held_out.prompt, attacked=held_out.prompt + " x x", verdicts=verdicts(True)),
    )
    rows = [r for r in RedTeamReplay(run).rows() if isinstance(r, HarmfulRow)]
    known = EvaluatedTexts({"harmful": [held_out]}, [])
    assert [known.overlap(own) is not None for own in rows] == [True]


def test_noise_without_a_search_is_an_attack_like_the_others() -> None:
    attack: Attack = Mixture([NoAttack(), Noise("character", 0.3)], weights=[0.0, 1.0])
    batch: AdversarialBatch = text_batch(3)
    attacked = attack(chat_model(), batch, rng())
    assert any(text != prompt for text, prompt in zip(attacked.texts, batch.prompts, strict=True))


def test_noise_is_of_the_certificates_unit_and_stays_in_its_span() -> None:
    batch, model = ragged_batch(size=3), LanguageModel(tiny_model(dtype=torch.float64))
    drawn = [GaussianNoise(0.7)(model, batch, rng(seed)) for seed in range(200)]
    where, width = batch.attackable_mask, model.embed(batch.prompt_ids).shape[-1]
    values = torch.stack([own.delta[where] for own in drawn if own.delta is not None])
    # Of every coordinate sigma * rho / sqrt(width), as CertificationEvaluation's.
    std = 0.7 * float(mean_embedding_norm(model)) / width**0.5
    assert values.std().item() == pytest.approx(std, rel=0.02)
    assert values.mean().item() == pytest.approx(0, abs=4 * std / values.numel() ** 0.5)
    for own in drawn[:3]:
        assert own.delta is not None and not own.delta[~where].any()
        assert own.distance.isnan().all() and own.loss_curve.shape[0] == 0 and not own.forward_passes.any()
    assert not torch.equal(values[0], values[1])


def test_noise_comes_on_top_of_what_an_attack_finds() -> None:
    batch, model = ragged_batch(size=3), LanguageModel(tiny_model(dtype=torch.float64))
    found = GaussianNoise(0.7, PGD)(model, batch, rng())
    alone = PGD(model, batch, rng())
    generator = rng()  # PGD from the centre of its ball draws nothing
    noise = GaussianNoise(0.7)(model, batch, generator)
    assert found.delta is not None and alone.delta is not None and noise.delta is not None
    assert (found.delta - alone.delta - noise.delta).abs().max() < 1e-6
    assert torch.equal(found.loss_curve, alone.loss_curve)
    assert torch.equal(found.forward_passes, alone.forward_passes)


def test_noise_refuses_an_attack_that_writes_text() -> None:
    with pytest.raises(
        ValueError, match="GaussianNoise.attack: expected .* got DirectRequest; use EmbeddingPGD"
    ):
        GaussianNoise(0.5, DirectRequest())(chat_model(), text_batch(2), rng())


def test_noise_without_a_rng_is_not_the_noise_of_its_attack() -> None:
    """Both would begin at the same seed."""
    batch, model = ragged_batch(size=2), LanguageModel(tiny_model(dtype=torch.float64))
    where = batch.attackable_mask[0]
    delta = GaussianNoise(1.0)(model, batch).delta
    assert delta is not None
    (own,) = example_rngs(batch.select([0]), None)
    again = torch.randn(int(where.sum()), delta.shape[-1], generator=own)
    assert abs(torch.corrcoef(torch.stack([delta[0, where].flatten().float(), again.flatten()]))[0, 1]) < 0.5
