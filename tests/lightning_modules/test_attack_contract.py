"""What every attack promises, over every attack of the project; plus the particular promises of single
ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.nn.utils.rnn import pad_sequence

from datamodules.batch import AdversarialBatch
from experiments.config.compose import compose
from lightning_modules.attacks.base import Attack, AttackedPrompt, NoAttack
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt, append_slots
from lightning_modules.attacks.repeat import Repeat
from lightning_modules.attacks.suffix.slots import without_end_of_turn
from lightning_modules.attacks.training.mixture import Mixture
from lightning_modules.models.embeddings import mean_embedding_norm
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.models.reply import Reply
from tests.conftest import FAMILIES, ROOT, chat_model, data_batch, ragged_batch, tiny_model, untrusted_batch
from tests.support.attacks import CASES, Case, attack_classes

FINITE = [name for name in CASES if name.startswith(("pgd", "restarts", "fgsm"))]
BEST = [name for name, case in CASES.items() if case.keeps_best]
TYPED = [name for name, case in CASES.items() if case.text and case.typed]


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def loss_of(
    model: LanguageModel, batch: AdversarialBatch, attacked: AttackedPrompt, case: Case
) -> torch.Tensor:
    """CE of the targets recomputed from the attacked prompts alone; attacks that write text leave out the end
    of turn and what they force."""
    mask = batch.harmful_mask
    if case.text and case.typed:
        mask = without_end_of_turn(batch.harmful_ids, mask, model.chat.end_of_turn)[:, : case.target_tokens]
    losses = []
    with attacked.applied(model) as embeds:
        for i, keep in enumerate(attacked.prompt_mask):
            start = len(attacked.forced[i]) if attacked.forced else 0
            target = batch.harmful_ids[i : i + 1, start : int(mask[i].sum())]
            reply = Reply(target, torch.ones_like(target, dtype=torch.bool))
            if attacked.layers:
                # Perturbed layers are perturbed for the whole batch.
                reply = Reply(batch.harmful_ids, batch.harmful_mask)
                (scores,) = model.reply_log_probs(embeds, attacked.prompt_mask, reply)
                return mean_cross_entropy(scores, reply.mask).detach()
            (scores,) = model.reply_log_probs(embeds[i : i + 1, keep], keep[keep][None], reply)
            losses.append(mean_cross_entropy(scores, reply.mask).detach())
    return torch.cat(losses)


def test_every_attack_of_the_project_is_in_the_registry() -> None:
    # Trap: a new attack that no contract test knows of.
    registered = {type(case.build()) for case in CASES.values()}
    missing = [path for path, cls in attack_classes().items() if cls not in registered]
    assert not missing, f"add to tests/support/attacks.py: {missing}"
    assert len(attack_classes()) >= 18


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "attack").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_builds_an_attack_of_the_registry(path: Path) -> None:
    # one_step.yaml varies another file's attack.
    files = [str(path.with_name("embedding_pgd.yaml"))] if path.stem == "one_step" else []
    fragment = compose([*files, str(path)], [])["model"]["init_args"]["attack"]
    assert fragment["class_path"] in attack_classes()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--attack", type=Attack)
    assert callable(parser.instantiate(parser.parse_object({"attack": fragment})).attack)


@pytest.mark.parametrize("name", CASES)
def test_leaves_the_model_and_the_global_rng_as_they_were(name: str) -> None:
    # Trap: `.backward()` in the inner loop leaks weight gradients that train towards the harmful target.
    case = CASES[name]
    model = case.model()
    module = model.module.train()
    module.model.layers[1].eval()
    for i, p in enumerate(module.parameters()):
        p.requires_grad_(i % 2 == 0)
        p.grad = torch.full_like(p, 0.5) if i % 4 == 0 else None
    before, state = copy.deepcopy(module), torch.get_rng_state()
    gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    case.build()(model, case.batch(2), rng())
    for p, q, g in zip(module.parameters(), before.parameters(), gradients, strict=True):
        assert torch.equal(p, q)
        assert p.requires_grad == q.requires_grad
        assert (p.grad is None) if g is None else torch.equal(p.grad, g)
    assert [m.training for m in module.modules()] == [m.training for m in before.modules()]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CASES)
def test_same_rng_same_bits(name: str) -> None:
    case = CASES[name]
    model = case.model()
    first, second = (case.build()(model, case.batch(2), rng()) for _ in range(2))
    torch.testing.assert_close(first.loss_curve, second.loss_curve, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(first.prompt_ids, second.prompt_ids)
    deltas = first.delta, second.delta
    assert deltas == (None, None) or torch.equal(*deltas)  # type: ignore[arg-type]
    assert (first.texts, first.histories, first.forced) == (second.texts, second.histories, second.forced)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.alone])
def test_batch_mates_and_padding_change_nothing(name: str) -> None:
    case = CASES[name]
    model = case.model(torch.float64)
    together = case.build()(model, case.batch(3), rng())
    for i in range(3):
        alone = case.build()(model, case.batch(1, i), rng())
        column = together.loss_curve[:, i]
        torch.testing.assert_close(
            alone.loss_curve.squeeze(1), column[: len(alone.loss_curve)], equal_nan=True
        )
        assert column[len(alone.loss_curve) :].isnan().all()
        if alone.delta is not None and together.delta is not None:
            torch.testing.assert_close(
                alone.delta[0], together.delta[i, -alone.delta.shape[1] :], atol=1e-7, rtol=1e-6
            )
        assert alone.texts == together.texts[i : i + 1]
        assert alone.forward_passes[0] == together.forward_passes[i]
        assert alone.backward_passes[0] == together.backward_passes[i]


@pytest.mark.parametrize("name", BEST)
def test_objective_is_not_worse_than_at_the_start_and_reported_truly(name: str) -> None:
    case = CASES[name]
    model, batch = case.model(), case.batch()
    attacked = case.build()(model, batch, rng())
    assert (attacked.best_loss <= attacked.start_loss).all()
    # Trap: the "best" perturbation as an alias of the tensor that later steps update in place.
    torch.testing.assert_close(
        loss_of(model, batch, attacked, case), attacked.best_loss, atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", TYPED)
def test_what_is_said_to_be_typed_gives_the_attacked_ids(name: str) -> None:
    case = CASES[name]
    model = case.model()
    attacked = case.build()(model, case.batch(), rng())
    assert attacked.is_text
    assert attacked.delta is None
    for i, text in enumerate(attacked.texts):
        history = attacked.histories[i] if attacked.histories else ()
        forced = attacked.forced[i] if attacked.forced else ()
        typed = [*model.chat.prompt(text, None, history).ids, *forced]
        assert typed == attacked.prompt_ids[i, attacked.prompt_mask[i]].tolist()


@pytest.mark.parametrize(
    "name", ["pgd_l2", "pgd_linf", "pgd_adam", "soft_prompt", "fgsm", "latent", "latent_layer"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_reduces_the_loss_on_every_family(name: str, family: str) -> None:
    attacked = CASES[name].build()(LanguageModel(tiny_model(family)), ragged_batch(), rng())
    assert (attacked.best_loss < attacked.start_loss).all()
    assert not attacked.zero_gradient.any()


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_stays_in_the_ball_and_in_the_span(name: str, family: str) -> None:
    model, batch = LanguageModel(tiny_model(family)), ragged_batch()
    attack = CASES[name].build()
    attacked = attack(model, batch, rng())
    pgd = attack.attack if isinstance(attack, Repeat) else attack
    assert isinstance(pgd, EmbeddingPGD)
    assert attacked.delta is not None
    rho = mean_embedding_norm(model).item() if pgd.radius_unit == "embedding_norm" else 1.0
    assert pgd.epsilon is not None
    assert pgd.ball.size(attacked.delta).max() <= pgd.epsilon * rho * (1 + 1e-6)
    assert (attacked.delta[~batch.attackable_mask] == 0).all()
    torch.testing.assert_close(attacked.distance, pgd.ball.size(attacked.delta).amax(1) / (pgd.epsilon * rho))


ON_DATA = (
    *("pgd_l2", "pgd_linf", "fgsm", "soft_prompt", "direct", "best_of_n", "initial_suffix", "gcg"),
    *("gcg_before", "gcg_around", "adaptive_gcg", "beast", "random_search", "rewrite_then_perturb"),
)


@pytest.mark.parametrize("make", [lambda: data_batch(2), untrusted_batch])
def test_only_what_is_untrusted_changes(make: Callable[[], AdversarialBatch]) -> None:
    """The trusted instruction, the system message and the marks are what they were, whatever attacks; in a
    row without a document it is the user's text that changes."""
    model, batch = chat_model(), make()
    chat = model.chat
    clean = [batch.envelope(i).prompt(chat, batch.prompts[i]) for i in range(2)]
    for name in ON_DATA:
        attacked = CASES[name].build()(model, batch, rng())
        for i, before in enumerate(clean):
            ids = attacked.prompt_ids[i, attacked.prompt_mask[i]].tolist()
            envelope = batch.envelope(i)
            places = [k for k, role in enumerate(before.roles) if role is envelope.role]
            first, rest = places[0], len(before.ids) - places[-1] - 1
            assert ids[:first] == before.ids[:first], name
            assert ids[len(ids) - rest :] == before.ids[len(before.ids) - rest :], name
            if attacked.texts:
                written = envelope.prompt(chat, attacked.texts[i])
                assert ids == written.ids, name
                left, right = envelope.span(before), envelope.span(written)
                assert before.text[: left[0]] == written.text[: right[0]], name
                assert before.text[left[1] :] == written.text[right[1] :], name
            if attacked.delta is not None:
                moved = (attacked.delta[i, attacked.prompt_mask[i]] != 0).any(1).nonzero()
                assert first <= moved.min(), name
                assert moved.max() < len(ids) - rest, name


def test_slots_follow_the_last_attackable_token() -> None:
    batch = ragged_batch()
    widened = append_slots(batch, 2, token_id=7).validate()
    rows = [ids[mask].tolist() for ids, mask in zip(widened.prompt_ids, widened.prompt_mask, strict=True)]
    old = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    # The template's last two tokens come after the user's text.
    assert rows == [row[:-2] + [7, 7] + row[-2:] for row in old]
    assert widened.attackable_mask.sum(1).tolist() == [2, 2, 2]
    assert (
        pad_sequence([torch.tensor(r) for r in rows], batch_first=True).shape[1]
        == widened.prompt_ids.shape[1]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"epsilon": 0.0},
            r"EmbeddingPGD.epsilon: expected a number > 0 or null, got 0.0",
        ),
        ({"num_steps": 0}, r"EmbeddingPGD.num_steps: expected an integer >= 1, got 0"),
        ({"step_size": 0.0}, r"EmbeddingPGD.step_size: expected a number > 0, got 0.0"),
        (
            {"epsilon": None},
            r"EmbeddingPGD.step_unit: expected 'embedding_norm' or 'absolute' without a radius",
        ),
        (
            {"epsilon": None, "step_unit": "absolute", "random_start": True},
            "EmbeddingPGD.random_start: expected false without a radius",
        ),
    ],
)
def test_impossible_values(fields: dict[str, object], message: str) -> None:
    # Trap: a shipped baseline with radius 0.
    with pytest.raises(ValueError, match=message):
        EmbeddingPGD(**fields)  # type: ignore[arg-type]


def test_repetitions_need_randomness() -> None:
    with pytest.raises(
        ValueError, match="Repeat.attack: expected random_start true and keep 'best', got False"
    ):
        Repeat(EmbeddingPGD())
    for same in (LatentPGD(layers=[0]), SoftPrompt()):
        with pytest.raises(ValueError, match=r"Repeat.attack: expected an attack with a random part, got"):
            Repeat(same)


def test_a_mixture_draws_each_attack_by_its_weight() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch(size=1)
    mixture = Mixture([NoAttack(), EmbeddingPGD(num_steps=1)], [1.0, 3.0])
    drawn = [
        mixture(model, batch, torch.Generator().manual_seed(seed)).delta is not None for seed in range(60)
    ]
    assert 0.6 < sum(drawn) / 60 < 0.9
    with pytest.raises(
        ValueError, match=r"expected one weight >= 0 for each of 1 attacks, not all 0, got \[0.0\]"
    ):
        Mixture([NoAttack()], [0.0])
