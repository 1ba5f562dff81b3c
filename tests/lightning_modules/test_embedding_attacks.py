"""Attacks on embeddings and layers: passes, gradients by finite differences, balls, precisions."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_modules.attacks.base import NoAttack
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.embeddings import mean_embedding_norm
from lightning_modules.models.hidden_states import perturbed_layers
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.models.reply import Reply
from tests.conftest import ragged_batch, tiny_model


def test_pass_counts_follow_the_paper() -> None:
    # Table 1 counts 10 forward and 10 backward passes for CAT; `best` adds one forward for the last iterate.
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    last = EmbeddingPGD(num_steps=10, keep="last")(model, batch)
    best = EmbeddingPGD(num_steps=10, keep="best")(model, batch)
    assert (last.forward_passes.tolist(), last.backward_passes.tolist()) == ([10] * 3, [10] * 3)
    assert (best.forward_passes.tolist(), best.backward_passes.tolist()) == ([11] * 3, [10] * 3)
    assert NoAttack()(model, batch).forward_passes.tolist() == [0] * 3


def test_converged_examples_leave_the_batch() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch(size=4)
    attacked = EmbeddingPGD(epsilon=1.0, num_steps=8, stop_loss=4.55)(model, batch)
    passes = attacked.forward_passes
    assert passes.min() < passes.max()
    for i in range(4):
        column = attacked.loss_curve[:, i]
        assert int((~column.isnan()).sum()) == passes[i]
        if passes[i] < 9:
            assert column[passes[i] - 1] < 4.55


def test_one_sign_step_is_fgsm() -> None:
    model, batch = LanguageModel(tiny_model(dtype=torch.float64)), ragged_batch()
    attacked = EmbeddingPGD(
        epsilon=0.1, ball="linf", num_steps=1, step_size=1.0, step_rule="sign", keep="last"
    )(model, batch)
    embeds = model.embed(batch.prompt_ids).detach().requires_grad_()
    reply = Reply(batch.harmful_ids, batch.harmful_mask)
    loss = mean_cross_entropy(model.reply_log_probs(embeds, batch.prompt_mask, reply)[0], reply.mask).sum()
    (gradient,) = torch.autograd.grad(loss, embeds)
    expected = -0.1 * mean_embedding_norm(model) * gradient.sign() * batch.attackable_mask[..., None]
    torch.testing.assert_close(attacked.delta, expected.double())


def test_gradient_of_the_attack_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    # Llama's norm computes in fp32 whatever the weights are; differences need it in float64.
    def norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    model, batch = LanguageModel(tiny_model(dtype=torch.float64)), ragged_batch(size=1)
    reply = Reply(batch.harmful_ids, batch.harmful_mask)
    clean = model.embed(batch.prompt_ids).detach()

    def loss(delta: torch.Tensor) -> torch.Tensor:
        return mean_cross_entropy(
            model.reply_log_probs(clean + delta, batch.prompt_mask, reply)[0], reply.mask
        ).sum()

    delta = torch.zeros_like(clean).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(delta), delta)
    g = torch.Generator().manual_seed(5)
    for _ in range(5):
        direction = torch.randn(clean.shape, generator=g, dtype=torch.float64)
        h = 1e-6
        numeric = (loss(delta + h * direction) - loss(delta - h * direction)) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-9)


def test_perturbation_is_fp32_and_moves_in_bf16() -> None:
    # Trap: a half-precision update with a small step rounds to nothing.
    model, batch = LanguageModel(tiny_model(dtype=torch.bfloat16)), ragged_batch()
    attacked = EmbeddingPGD(
        epsilon=0.05, step_unit="absolute", step_size=1e-4, step_rule="sign", num_steps=3, keep="last"
    )(model, batch)
    assert attacked.delta is not None
    assert attacked.delta.dtype == torch.float32
    assert (attacked.delta[batch.attackable_mask].abs() > 0).float().mean() > 0.9


def test_attack_sees_no_dropout() -> None:
    model = tiny_model().train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = LanguageModel(model)
    curves = [EmbeddingPGD(num_steps=2)(model, ragged_batch()).loss_curve for _ in range(2)]
    assert torch.equal(*curves)


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="set trainer.inference_mode: false"):
        EmbeddingPGD()(LanguageModel(tiny_model()), ragged_batch())


def test_works_under_no_grad() -> None:
    with torch.no_grad():
        attacked = EmbeddingPGD(num_steps=2)(LanguageModel(tiny_model()), ragged_batch())
    assert (attacked.best_loss < attacked.start_loss).all()


def test_latent_perturbation_stays_in_its_balls_and_in_the_span() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    attacked = LatentPGD(layers=[0], epsilon=0.5, radius_unit="embedding_norm", num_steps=4)(model, batch)
    radius = 0.5 * mean_embedding_norm(model) * (1 + 1e-6)
    assert attacked.delta is not None
    for delta in (attacked.delta, attacked.layers[0]):
        assert delta.norm(dim=-1).max() <= radius
        assert (delta[~batch.attackable_mask] == 0).all()
        assert delta.any()


def test_a_perturbed_layer_is_its_output_plus_delta() -> None:
    # With delta on the last layer only, the final norm sees h + delta.
    model, batch = LanguageModel(tiny_model()), ragged_batch(size=1)
    embeds, mask = model.embed(batch.prompt_ids), batch.prompt_mask
    seen: list[torch.Tensor] = []
    handle = (
        causal_lm(model.module)
        .get_decoder()
        .norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    )
    delta = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(5))
    model.reply_log_probs(embeds, mask, Reply(batch.harmful_ids, batch.harmful_mask))
    with perturbed_layers(model, {1: delta}):
        model.reply_log_probs(embeds, mask, Reply(batch.harmful_ids, batch.harmful_mask))
    handle.remove()
    torch.testing.assert_close(seen[1][:, : delta.shape[1]], seen[0][:, : delta.shape[1]] + delta)
    assert torch.equal(seen[1][:, delta.shape[1] :], seen[0][:, delta.shape[1] :])


def test_latent_layers_must_exist() -> None:
    with pytest.raises(ValueError, match="expected distinct layer numbers counted from 0, got"):
        LatentPGD(layers=[])
    with pytest.raises(ValueError, match="expected layers below 2, got"):
        LatentPGD(layers=[2])(LanguageModel(tiny_model()), ragged_batch())
