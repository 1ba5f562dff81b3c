"""The refusal direction: found where it is known, removed everywhere, and chosen by what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from lightning_modules.attacks.embedding.refusal_direction import DirectionalAblation
from lightning_modules.attacks.transfer import Ablated, DirectionAdded, transfer_of, turned_of
from lightning_modules.models.adapters import disabled_adapters
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.hidden_states import conversation_states
from lightning_modules.models.language_model import Encoded, LanguageModel
from lightning_modules.models.loading import ModelConfig, load_seeded
from lightning_modules.models.refusal_direction import (
    Direction,
    ablated,
    chosen,
    first_log_probs,
    mean_differences,
    refusal_log_odds,
)
from tests.conftest import FAMILIES, chat_model, text_batch, tiny_model
from tests.support.adapters import lora

HARMFUL, HARMLESS, REFUSAL = 5, 6, 7


def linear_model() -> LanguageModel:
    """A model whose layers add nothing, so that a state is its token's embedding: e0 + e1 for harmful tokens,
    e0 - e1 for harmless ones. The refusal's logit is 4 times the normed state's second coordinate."""
    module = tiny_model()
    with torch.no_grad():
        for layer in causal_lm(module).get_decoder().layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings, head = module.get_input_embeddings().weight, module.get_output_embeddings().weight
        embeddings.zero_()
        embeddings[:, 0] = 1.0
        embeddings[HARMFUL, 1], embeddings[HARMLESS, 1] = 1.0, -1.0
        head.zero_()
        head[REFUSAL, 1] = 4.0
    return LanguageModel(module)


def prompts(token: int) -> Encoded:
    """Two prompts of different length that end in a token."""
    ids = torch.tensor([[3, 4, token], [0, 4, token]])
    return Encoded(ids, torch.tensor([[True, True, True], [False, True, True]]))


def test_the_difference_of_means_is_the_direction_that_was_put_in() -> None:
    """At the last position the means are e0 + e1 and e0 - e1, so the difference is 2 e1; before it all
    prompts are the same."""
    found = mean_differences(linear_model(), prompts(HARMFUL), prompts(HARMLESS), num_positions=2)
    assert [(own.layer, own.position) for own in found] == [(0, -1), (0, -2), (1, -1), (1, -2)]
    wanted = torch.zeros(32)
    wanted[1] = 2.0
    torch.testing.assert_close(found[0].vector, wanted)
    torch.testing.assert_close(found[2].vector, wanted)
    assert not found[1].vector.any()


def test_without_the_direction_a_refusal_is_as_likely_as_any_token() -> None:
    """RMS of e0 + e1 over 32 coordinates is sqrt(2 / 32) = 1 / 4, so the normed state is 4 (e0 + e1) and the
    refusal's logit 16, the other 96 being 0: log-odds 16 - ln 96. Without e1 all 97 logits are 0: -ln 96."""
    model, unseen = linear_model(), prompts(HARMFUL)
    log_96 = torch.tensor(96.0).log()
    before = refusal_log_odds(first_log_probs(model, unseen), [REFUSAL])
    torch.testing.assert_close(before, (16 - log_96).expand(2), atol=2e-3, rtol=0)
    vector = torch.zeros(32)
    vector[1] = -3.0
    with ablated(model, vector):
        after = refusal_log_odds(first_log_probs(model, unseen), [REFUSAL])
    torch.testing.assert_close(after, (-log_96).expand(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(refusal_log_odds(first_log_probs(model, unseen), [REFUSAL]), before)


def test_validation_chooses_the_direction_that_refuses_and_spares_the_harmless(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """2 e1 takes the refusals away; e2 does nothing. Without e1 a harmless prompt's logit of -16 becomes 0:
    from uniform over 96 tokens to uniform over 97, KL = ln(97 / 96) = 0.0104 nats. Added, 2 e1 makes e0 + e1
    of a harmless prompt's e0 - e1: log-odds 16 - ln 96 = 11.436."""
    model = linear_model()
    first, second = 2 * torch.eye(32)[1], torch.eye(32)[2]
    candidates = [Direction(0, -1, second), Direction(0, -2, first), Direction(1, -1, first)]
    unseen = prompts(HARMFUL), prompts(HARMLESS), [REFUSAL]
    found = chosen(model, candidates, *unseen, max_kl=0.1, max_depth=0.5)
    assert (found.layer, found.position) == (0, -2)
    assert found.kl == pytest.approx(0.01036, abs=1e-4)
    assert found.refusal == pytest.approx(-4.564, abs=1e-2)
    assert found.induced == pytest.approx(11.436, abs=1e-2)
    assert not caplog.text
    # Below that, only e2 is left, which induces nothing.
    assert chosen(model, candidates, *unseen, max_kl=0.005, max_depth=0.5).position == -1
    assert "no candidate within max_kl 0.005 makes harmless requests refused where it is added" in caplog.text


def test_a_direction_that_induces_refusals_is_preferred_to_one_that_only_takes_them_away() -> None:
    """Along -2 e1 the same is removed, and added, a harmless prompt's e0 - e1 becomes e0 - 3 e1."""
    candidates = [Direction(0, -1, -2 * torch.eye(32)[1]), Direction(0, -2, 2 * torch.eye(32)[1])]
    unseen = prompts(HARMFUL), prompts(HARMLESS), [REFUSAL]
    assert chosen(linear_model(), candidates, *unseen, max_kl=0.1, max_depth=1.0).position == -2


def test_probabilities_that_are_not_finite_are_no_choice() -> None:
    model = linear_model()
    with torch.no_grad():
        causal_lm(model.module).get_output_embeddings().weight[9] = float("nan")
    with pytest.raises(ValueError, match="expected finite probabilities without layer 0's direction"):
        chosen(
            model,
            [Direction(0, -1, torch.eye(32)[1])],
            prompts(HARMFUL),
            prompts(HARMLESS),
            [REFUSAL],
            0.1,
            1.0,
        )


def test_positions_before_the_shortest_prompt_are_refused() -> None:
    with pytest.raises(
        ValueError, match="num_positions: expected at most 2, the tokens of the shortest prompt"
    ):
        mean_differences(linear_model(), prompts(HARMFUL), prompts(HARMLESS), 3)


def test_where_none_spares_the_harmless_the_least_harm_is_taken_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    candidates = [Direction(0, -1, torch.eye(32)[1])]
    chosen(linear_model(), candidates, prompts(HARMFUL), prompts(HARMLESS), [REFUSAL], 0.001, 1.0)
    assert "max_kl 0.001; taken: layer 0, position -1, which changes them by 0.0104 nats" in caplog.text


def test_the_same_requests_on_both_sides_have_no_direction() -> None:
    candidates = mean_differences(linear_model(), prompts(HARMFUL), prompts(HARMFUL), 1)
    with pytest.raises(ValueError, match="got a difference of length 0; lower num_positions"):
        chosen(linear_model(), candidates, prompts(HARMFUL), prompts(HARMLESS), [REFUSAL], 0.1, 1.0)


def test_in_bf16_the_direction_is_gone_but_for_the_rounding_of_the_result() -> None:
    model = LanguageModel(tiny_model(dtype=torch.bfloat16))
    vector, own = torch.randn(32, generator=torch.Generator().manual_seed(0)), prompts(HARMFUL)
    with torch.no_grad(), ablated(model, vector):
        states = conversation_states(model, own.prompt_ids, own.prompt_mask, [0, 1])
    for found in states:
        kept = found[own.prompt_mask].double()
        component = (kept @ (vector / vector.norm()).double()).abs()
        # Each of 32 coordinates is rounded by at most 2^-9 of itself, in no common direction.
        assert (component < 2**-9 * kept.norm(dim=1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_part_of_the_stream_keeps_the_direction(family: str) -> None:
    """Outputs of layers, and what stands between attention and MLP, which the hooks of layers do not see."""
    model = LanguageModel(tiny_model(family))
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    between: list[Tensor] = []

    def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
        between.append(inputs[0])

    own = prompts(HARMFUL)
    for layer in causal_lm(model.module).get_decoder().layers:
        sandwiched = hasattr(layer, "pre_feedforward_layernorm")
        norm = layer.pre_feedforward_layernorm if sandwiched else layer.post_attention_layernorm
        norm.register_forward_pre_hook(keep)
    with torch.no_grad(), ablated(model, vector):
        after = conversation_states(model, own.prompt_ids, own.prompt_mask, [0, 1])
    assert len(between) == 2
    for states in [*after, *between]:
        assert (states @ vector)[own.prompt_mask].abs().max() < 1e-5 * states.norm()
    with torch.no_grad():
        plain = conversation_states(model, own.prompt_ids, own.prompt_mask, [0, 1])
    assert all((states @ vector)[own.prompt_mask].abs().max() > 1e-3 for states in plain)


def attack(num_fit: int = 4, max_kl: float = 1e9, max_depth: float = 0.8) -> DirectionalAblation:
    harmless = TinyChatBenign("train", 8, categories=["guide"])
    return DirectionalAblation(
        TinyChatHarmful("train"), harmless, num_fit, 2, max_kl=max_kl, max_depth=max_depth
    )


def test_too_few_requests_are_named() -> None:
    with pytest.raises(ValueError, match=r"harmless: expected 9 requests .* got 8; lower them"):
        attack(num_fit=7)(chat_model(), text_batch(1))


def test_other_weights_have_another_direction() -> None:
    """Trap: the direction of the model before training, removed from the one after it."""
    own, model = attack(), chat_model()
    first = own.direction(model)
    assert own.direction(model) is first
    with torch.no_grad():
        causal_lm(model.module).get_decoder().layers[0].mlp.down_proj.weight.mul_(2)
    assert not torch.equal(own.direction(model).vector, first.vector)


def test_without_its_adapters_a_model_has_another_direction() -> None:
    own, adapted = attack(), chat_model()
    model = LanguageModel(lora(adapted.module).eval(), adapted.chat)
    first = own.direction(model)
    with disabled_adapters(model.module):
        assert not torch.equal(own.direction(model).vector, first.vector)


def test_the_direction_of_the_model_before_training_can_be_taken_instead() -> None:
    """Trained weights do not move it, and it is what the attack removes."""
    model, before = chat_model(), attack(max_kl=2.0, max_depth=1.0)
    before.found_in = ModelConfig("tinychat:aligned")
    aligned = LanguageModel(load_seeded(ModelConfig("tinychat:aligned"), 0).eval(), model.chat)
    expected = attack(max_kl=2.0, max_depth=1.0).direction(aligned)
    found = before.direction(model)
    assert (found.layer, found.position) == (expected.layer, expected.position)
    torch.testing.assert_close(found.vector, expected.vector)
    with torch.no_grad():
        causal_lm(model.module).get_decoder().layers[0].mlp.down_proj.weight.mul_(2)
    assert before.direction(model) is found


def test_a_part_of_the_batch_keeps_the_ablation() -> None:
    attacked = attack()(chat_model(), text_batch(2))
    assert attacked.ablated is not None
    assert attacked.select(1, 2).ablated is attacked.ablated


def test_benign_prompts_lose_the_direction_or_gain_it() -> None:
    own = attack()
    assert isinstance(transfer_of(own), Ablated)
    assert isinstance(turned_of(own), DirectionAdded)
