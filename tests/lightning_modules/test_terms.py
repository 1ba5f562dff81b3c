"""Further terms of the loss against hand-derived values, finite differences and what they say when they
cannot work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from callbacks.evaluations.base import introduce
from datamodules.batch import TrainingBatch
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.base import NoAttack
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.losses.base import Step, Term
from lightning_modules.losses.circuit_breakers import CircuitBreakers, reroute, retain
from lightning_modules.losses.distributions import Distillation, KLRetain, token_kl
from lightning_modules.losses.toward_away import TowardAwayUtility
from lightning_modules.losses.weights import SpectralSpread, WeightDrift, singular_values
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.embeddings import embedding_matrix, embedding_weight
from lightning_modules.models.frozen import Reference
from lightning_modules.models.hidden_states import conversation_states, reply_states
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import LoraSettings, ModelConfig, load_seeded
from lightning_modules.models.logits import reply_logits
from lightning_modules.models.passes import PassCounter
from tests.conftest import chat_model, ragged_batch, text_batch, tiny_model, utility
from tests.support.training import data

WIDE = {"dtype": torch.float64}
TINYCHAT = ModelConfig("tinychat:aligned")


class Start:
    """A reference that is another model altogether."""

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model = language_model

    def active(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def context() -> Any:
            with torch.no_grad():
                yield self.language_model

        return context()


def step(
    language_model: LanguageModel,
    start: LanguageModel | None = None,
    attack: Any = None,
    number: int = 0,
    total: int = 10,
    **changes: Any,
) -> Step:
    batch = TrainingBatch(**({"adversarial": ragged_batch(), "utility": utility()} | changes))
    attacked = (
        None if batch.adversarial is None else (attack or NoAttack())(language_model, batch.adversarial)
    )
    begun = Start(start or language_model)
    return Step(language_model, begun, batch, attacked, number, total)  # type: ignore[arg-type]


# --- by hand


def test_token_kl_by_hand() -> None:
    # p = (1/4, 3/4), q = (1/2, 1/2): 1/4 ln 1/2 + 3/4 ln 3/2. At T = 2: p = (1, sqrt 3) / (1 + sqrt 3), times
    # 4.
    teacher, student = torch.tensor([[0.0, math.log(3)]], **WIDE), torch.zeros(1, 2, **WIDE)
    torch.testing.assert_close(
        token_kl(teacher, student), torch.tensor([0.25 * math.log(0.5) + 0.75 * math.log(1.5)], **WIDE)
    )
    p = 1 / (1 + math.sqrt(3))
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    torch.testing.assert_close(token_kl(teacher, student, 2.0), torch.tensor([expected], **WIDE))


def test_singular_values_by_hand_and_against_svd() -> None:
    # Columns of length 3 and 1 at right angles: singular values 3 and 1, spread 1.
    assert singular_values(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], **WIDE)).std(
        correction=0
    ).item() == pytest.approx(1.0)
    matrix = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), **WIDE)
    torch.testing.assert_close(singular_values(matrix), torch.linalg.svdvals(matrix).flip(0))


def test_reroute_and_retain_by_hand() -> None:
    # cos = 1 and 0.6 on the counted tokens, -1 becomes 0; the masked token does not count.
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]], **WIDE)
    now = torch.tensor([[[2.0, 0.0], [3.0, 4.0], [-1.0, 0.0], [9.0, 0.0]]], **WIDE)
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(reroute(now, before, mask), torch.tensor([1.6 / 3], **WIDE))
    # Distances 1, sqrt(4 + 16), 2.
    torch.testing.assert_close(retain(now, before, mask), torch.tensor([(1 + math.sqrt(20) + 2) / 3], **WIDE))


def test_circuit_breakers_schedules() -> None:
    # alpha 10, T' = 2 * 150: at step 75 c_s = 10 (1 - 1/4) and c_r = 10 / 4; at an explicit horizon it stays
    # there.
    language_model = LanguageModel(tiny_model())
    assert CircuitBreakers([0]).weights(step(language_model, number=75, total=150)) == (7.5, 2.5)
    assert CircuitBreakers([0], horizon=50).weights(step(language_model, number=75, total=150)) == (0.0, 10.0)


def test_circuit_breakers_at_the_start_reroute_fully_and_keep_everything() -> None:
    language_model = LanguageModel(tiny_model())
    with PassCounter() as passes:
        terms = CircuitBreakers([0, 1], alpha=5.0)(step(language_model))
    # The states are the reference's: cos = 1, distance 0; c_s = 5 and c_r = 0.
    torch.testing.assert_close(terms.parts["loss_reroute"], torch.ones(3))
    assert terms.parts["loss_retain"].max() < 1e-6
    assert terms.loss.item() == pytest.approx(5.0, rel=1e-5)
    grads = torch.autograd.grad(terms.loss, list(language_model.module.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in grads if g is not None)
    # Three harmful and four utility rows: the reference's forwards, then the policy's forwards and backwards.
    assert (passes.forward, passes.backward) == (2 * (3 + 4), 3 + 4)


def test_states_of_replies_and_conversations_agree() -> None:
    # A right-padded conversation and the same tokens as prompt + reply go through the same layers.
    language_model, batch = LanguageModel(tiny_model(dtype=torch.float64)), ragged_batch()
    from lightning_modules.models.reply import Reply

    reply = Reply(batch.harmful_ids, batch.harmful_mask)
    states = reply_states(
        language_model, language_model.embed(batch.prompt_ids), batch.prompt_mask, reply, [1]
    )[0]
    for i in range(len(batch)):
        prompt, own = batch.prompt_ids[i][batch.prompt_mask[i]], batch.harmful_ids[i][batch.harmful_mask[i]]
        ids = torch.cat([prompt, own[:-1]])[None]
        whole = conversation_states(language_model, ids, torch.ones_like(ids, dtype=torch.bool), [1])[0]
        torch.testing.assert_close(states[i, : len(own) - 1], whole[0, len(prompt) :])
        logits = reply_logits(
            language_model, language_model.embed(batch.prompt_ids), batch.prompt_mask, reply
        )
    (log_probs,) = language_model.reply_log_probs(
        language_model.embed(batch.prompt_ids), batch.prompt_mask, reply
    )
    picked = logits.log_softmax(-1).gather(1, reply.ids[reply.mask][:, None]).squeeze(1)
    torch.testing.assert_close(picked, log_probs[reply.mask].to(picked))


def test_kl_retain_is_zero_at_the_start_and_equals_the_definition_later() -> None:
    language_model, start, batch = LanguageModel(tiny_model()), LanguageModel(tiny_model(seed=1)), utility()
    assert KLRetain()(step(language_model)).loss.abs().max() < 1e-6
    terms = KLRetain(weight=0.5)(step(language_model, start))
    for i in range(len(batch)):
        ids, scored = batch.input_ids[i][batch.attention_mask[i]][None], batch.labels[i, 1:] != -100
        p, q = (
            causal_lm(v.module)(input_ids=ids).logits[0, :-1].log_softmax(-1)[scored[: ids.shape[1] - 1]]
            for v in (start, language_model)
        )
        assert terms.loss[i].item() == pytest.approx(
            0.5 * (p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4
        )


def test_distillation_compares_the_attacked_student_with_the_clean_teacher() -> None:
    language_model = LanguageModel(tiny_model())
    assert Distillation()(step(language_model)).loss.abs() < 1e-6
    attacked = Distillation()(step(language_model, attack=EmbeddingPGD(epsilon=0.5, num_steps=2)))
    assert attacked.parts["loss_distil_safe"].min() > 1e-4
    assert attacked.parts["loss_distil_utility"].max() < 1e-6
    other = Distillation(teacher=ModelConfig("tinychat:helpful"))
    chat = LanguageModel(load_seeded(TINYCHAT, 0))
    assert other(step(chat, adversarial=text_batch(2), utility=None)).loss > 0.1
    with pytest.raises(ValueError, match="over the student's 97 tokens, got 2048"):
        other(step(language_model))


def test_weight_drift_by_hand() -> None:
    language_model, config = LanguageModel(load_seeded(TINYCHAT, 0)), TINYCHAT
    at = Step(language_model, Reference(language_model, config), TrainingBatch(None, utility()), None, 0, 1)
    assert WeightDrift()(at).loss.item() == 0.0
    with torch.no_grad():
        embedding_weight(language_model).add_(0.1)
    # Every one of V * d weights moved by 0.1; the tied head is the same tensor and counts once.
    count = embedding_weight(language_model).numel()
    for which in ("all", "embeddings"):
        drift = WeightDrift(2.0, which)  # type: ignore[arg-type]
        assert drift(at).loss.item() == pytest.approx(2.0 * 0.01 * count, rel=1e-4)


def test_weight_drift_of_adapters_is_that_of_their_product() -> None:
    model = get_peft_model(
        tiny_model(), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "embed_tokens"])
    )
    language_model = LanguageModel(model)
    at = Step(
        language_model,
        Reference(language_model, ModelConfig("unused", lora=LoraSettings(r=2))),
        TrainingBatch(None, utility()),
        None,
        0,
        1,
    )
    assert WeightDrift()(at).loss.item() == 0.0
    deltas = []
    for layer in model.modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight"):
            for own in [*layer.lora_B.values(), *layer.lora_embedding_A.values()]:
                torch.nn.init.normal_(
                    getattr(own, "weight", own), generator=torch.Generator().manual_seed(len(deltas))
                )
            deltas.append(layer.get_delta_weight("default"))
    expected = torch.stack([delta.square().sum() for delta in deltas]).sum()
    torch.testing.assert_close(WeightDrift(1.0)(at).loss, expected)
    matrix = embedding_matrix(language_model)
    torch.testing.assert_close(matrix, language_model.embed(torch.arange(97)))
    assert matrix.requires_grad
    assert SpectralSpread()(at).loss.requires_grad


# --- finite differences


def spread(matrix: torch.Tensor) -> torch.Tensor:
    return singular_values(matrix).std(correction=0)


TEACHER = torch.randn(3, 6, generator=torch.Generator().manual_seed(9), **WIDE)
STATES = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(8), **WIDE)
MASK = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (spread, (7, 3)),
        (lambda student: token_kl(TEACHER, student, 2.0), (3, 6)),
        (lambda states: reroute(states, STATES, MASK), (2, 3, 4)),
        (lambda states: retain(states, STATES, MASK), (2, 3, 4)),
    ],
    ids=["spectral_spread", "token_kl", "reroute", "retain"],
)
def test_finite_differences(function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> None:
    point = torch.randn(shape, generator=torch.Generator().manual_seed(3), **WIDE).requires_grad_()
    assert torch.autograd.gradcheck(function, (point,))


# --- what they say


TERMS: list[tuple[Term, str]] = [
    (KLRetain(), "KLRetain: expected utility rows, got none; set data.utility_per_step"),
    (CircuitBreakers([0]), "CircuitBreakers: expected harmful and utility rows"),
]


@pytest.mark.parametrize(("term", "message"), TERMS)
def test_missing_rows_are_named(term: Term, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        term(step(LanguageModel(tiny_model()), utility=None))


def test_a_frozen_embedding_and_a_missing_layer_are_named() -> None:
    language_model = LanguageModel(tiny_model())
    with pytest.raises(ValueError, match=r"CircuitBreakers.layers: expected layers below 2, got \[5\]"):
        CircuitBreakers([5])(step(language_model))
    language_model.module.requires_grad_(False)
    with pytest.raises(ValueError, match="SpectralSpread: expected an input embedding that learns"):
        SpectralSpread()(step(language_model))
    with pytest.raises(ValueError, match="WeightDrift.which: expected all weights that learn, got none"):
        WeightDrift()(step(language_model))


def test_terms_work_on_a_victim_in_training_mode() -> None:
    language_model = chat_model()
    language_model.module.train()
    for term in (KLRetain(), Distillation(), CircuitBreakers([1])):
        assert torch.isfinite(term(step(language_model, adversarial=text_batch(2))).loss).all()
        assert language_model.module.training


def test_terms_ask_for_both_streams_in_every_micro_batch() -> None:
    objective = TowardAwayUtility()
    regularised = AdversarialFineTuning(
        ModelConfig("tinychat:aligned"), NoAttack(), objective, terms=[WeightDrift()]
    )
    introduce(regularised, data(2), [])
    apart = data(3, outer_batch=4, utility_batch=4)
    with pytest.raises(
        ValueError, match=r"data.outer_batch and data.utility_batch: .*WeightDrift.* 1 and 2 of 3"
    ):
        introduce(regularised, apart, [])
    introduce(AdversarialFineTuning(ModelConfig("tinychat:aligned"), NoAttack(), objective), apart, [])
