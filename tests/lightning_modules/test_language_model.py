"""The language_model interface against the model's own forward pass, for every supported family."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from datamodules.batch import AdversarialBatch
from experiments.benchmarks.counters import Launches
from lightning_modules.models.adapters import merged_adapters
from lightning_modules.models.embeddings import mean_embedding_norm
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import LoraSettings, ModelConfig
from lightning_modules.models.norms import short_norms
from lightning_modules.models.packed import PackedRows
from lightning_modules.models.passes import PassCounter
from lightning_modules.models.reply import Reply
from lightning_modules.pretrained import PretrainedModel
from tests.conftest import FAMILIES, VOCABULARY, ragged_batch, tiny_model, utility
from tests.support.adapters import lora
from tests.support.training import double_norm


def replies(batch: AdversarialBatch) -> tuple[Reply, Reply]:
    return Reply(batch.safe_ids, batch.safe_mask), Reply(batch.harmful_ids, batch.harmful_mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_models_own_forward_row_by_row(family: str) -> None:
    model, batch = tiny_model(family), ragged_batch()
    scores = LanguageModel(model).reply_log_probs(
        LanguageModel(model).embed(batch.prompt_ids), batch.prompt_mask, *replies(batch)
    )
    for score, reply in zip(scores, replies(batch), strict=True):
        for i in range(len(batch)):
            prompt, continuation = batch.prompt_ids[i][batch.prompt_mask[i]], reply.ids[i][reply.mask[i]]
            ids = torch.cat([prompt, continuation])[None]
            logits = model(input_ids=ids).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected = logits.gather(1, continuation[:, None]).squeeze(1)
            torch.testing.assert_close(score[i][reply.mask[i]], expected, atol=3e-6, rtol=0)
        assert (score[~reply.mask] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_equals_separate_forwards_in_gradient(family: str) -> None:
    gradients = []
    for share in (True, False):
        model, batch = tiny_model(family), ragged_batch()
        language_model = LanguageModel(model, share_prompt=share)
        embeds = language_model.embed(batch.prompt_ids)
        embeds.retain_grad()
        safe, harmful = language_model.reply_log_probs(embeds, batch.prompt_mask, *replies(batch))
        (safe.sum() - 0.7 * harmful.sum()).backward()
        gradients.append([embeds.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_norm_is_what_the_decoder_receives(family: str) -> None:
    model = tiny_model(family)
    received: list[torch.Tensor] = []
    handle = model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: received.append(args[0]))
    model(input_ids=torch.arange(VOCABULARY)[None])
    handle.remove()
    expected = received[0].norm(dim=-1).mean()
    torch.testing.assert_close(mean_embedding_norm(LanguageModel(model)), expected.detach())


def test_embedding_norm_follows_training() -> None:
    model = tiny_model()
    language_model = LanguageModel(model)
    before = mean_embedding_norm(language_model).item()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2.0)
    assert mean_embedding_norm(language_model).item() == pytest.approx(2 * before)


def test_token_id_zero_is_an_ordinary_token() -> None:
    # Trap: `target_ids > 0` as a mask drops token 0.
    model, batch = tiny_model(), ragged_batch()
    reply = Reply(torch.zeros_like(batch.harmful_ids), batch.harmful_mask)
    (scores,) = LanguageModel(model).reply_log_probs(
        LanguageModel(model).embed(batch.prompt_ids), batch.prompt_mask, reply
    )
    assert (scores[reply.mask] < 0).all()


def test_labelled_log_probs_equal_the_models_loss() -> None:
    model, batch = tiny_model(), utility()
    scores, mask = LanguageModel(model).labelled_log_probs(
        batch.input_ids, batch.attention_mask, batch.labels
    )
    loss = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=batch.labels
    ).loss
    torch.testing.assert_close(-scores.sum() / mask.sum(), loss)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_stops_and_equals_greedy_decoding_without_padding(family: str) -> None:
    model, batch = tiny_model(family), ragged_batch()
    language_model = LanguageModel(model)
    generated = language_model.generate(
        language_model.embed(batch.prompt_ids), batch.prompt_mask, 6, stop_ids=[VOCABULARY - 1]
    )
    for i, row in enumerate(generated):
        ids = batch.prompt_ids[i][batch.prompt_mask[i]].tolist()
        for token in row:
            assert token == model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)
    first = generated[0][2]
    stopped = language_model.generate(
        language_model.embed(batch.prompt_ids), batch.prompt_mask, 6, stop_ids=[first]
    )
    assert stopped[0] == generated[0][: generated[0].index(first)]


def test_frozen_restores_everything() -> None:
    model = lora(tiny_model(), lora_dropout=0.5).train()
    model.base_model.model.model.layers[0].eval()  # type: ignore[union-attr,index]
    modes = {n: m.training for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(KeyError), LanguageModel(model).frozen():
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())


def test_merged_adapters_compute_the_same_and_leave_no_trace() -> None:
    model, ids = lora(tiny_model()).eval(), torch.arange(10)[None]
    expected = model(input_ids=ids).logits
    before = copy.deepcopy(model.state_dict())
    with merged_adapters(model.modules()) as count:
        assert count == 14  # seven linear layers in each of two blocks
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("fixed", [0, 3, 4], ids=["all anew", "too little", "beginnings once"])
@pytest.mark.parametrize("size", [1, 3], ids=["no padding", "padding"])
@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        (family, kind)
        for family in FAMILIES
        for kind in ("sdpa", "eager")
        if (family, kind) != ("gemma2", "sdpa")
    ],
)
def test_rows_without_gaps_score_as_the_batch_does(
    family: str, size: int, implementation: str, fixed: int
) -> None:
    module, batch = tiny_model(family, torch.float64), ragged_batch(size=size)
    module.set_attn_implementation(implementation)
    model, reply = LanguageModel(module), Reply(batch.harmful_ids, batch.harmful_mask)
    noise = torch.randn(*batch.prompt_ids.shape, 32, generator=torch.Generator().manual_seed(0)).double()
    touched = batch.prompt_mask & (batch.prompt_mask.cumsum(1) > fixed)
    noise = (noise * touched[..., None]).requires_grad_()
    (expected,) = model.reply_log_probs(model.embed(batch.prompt_ids) + noise, batch.prompt_mask, reply)
    (gradient,) = torch.autograd.grad(expected.sum(), noise)
    with model.frozen():
        with PassCounter() as passes:
            rows = PackedRows(model, batch.prompt_ids, batch.prompt_mask, reply, fixed=fixed)
        assert passes.total == 0
        assert rows.computed == rows.width - (fixed if fixed == 4 else 0)
        assert torch.equal(rows.returned(rows.placed(noise)), noise)
        scores = rows.log_probs(rows.clean + rows.placed(noise))
        (own,) = torch.autograd.grad(scores.sum(), noise)
        last = torch.tensor([size - 1])
        (some,) = rows.log_probs((rows.clean + rows.placed(noise))[last], last)
    lengths = batch.prompt_mask.sum(1) + batch.harmful_mask.sum(1)
    assert rows.width == int(lengths.max()) - 1
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    gradient = gradient * touched[..., None]
    torch.testing.assert_close(own * touched[..., None], gradient, atol=1e-6, rtol=0)
    torch.testing.assert_close(some, expected[-1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_norm_s_shorter_backward_pass_is_its_gradient(dtype: torch.dtype) -> None:
    norm, g = LlamaRMSNorm(32).to(dtype), torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(32, generator=g).to(dtype)
    x = torch.randn(5, 7, 32, generator=g).to(dtype).requires_grad_()
    upstream = torch.randn(5, 7, 32, generator=g).to(dtype)
    expected = norm(x)
    (gradient,) = torch.autograd.grad(expected, x, upstream)
    with short_norms([norm]), Launches() as launches:
        found = norm(x)
        forward = launches.kernels
        (own,) = torch.autograd.grad(found, x, upstream)
    assert torch.equal(found, expected)
    torch.testing.assert_close(own, gradient, atol=1e-6 if dtype != torch.bfloat16 else 0.02, rtol=1e-5)
    assert launches.kernels - forward <= 7
    assert "forward" not in vars(norm)


def test_other_norms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [part for part in tiny_model("gemma").modules() if "Norm" in type(part).__name__]
    assert others
    own = LlamaRMSNorm(4)
    monkeypatch.setattr(LlamaRMSNorm, "forward", double_norm)
    with short_norms([*others, own]):
        assert all("forward" not in vars(part) for part in [*others, own])


def test_a_rounded_merge_is_the_fp32_sum_rounded_once() -> None:
    model = lora(tiny_model(dtype=torch.bfloat16))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    before = layer.get_base_layer().weight.data.clone()
    expected = (before.float() + layer.get_delta_weight("default").float()).to(torch.bfloat16)
    with merged_adapters(model.modules(), rounded=True) as count:
        assert count == 14
        assert torch.equal(layer.get_base_layer().weight, expected)
        assert not torch.equal(expected, before)
    assert torch.equal(layer.get_base_layer().weight, before)


@pytest.mark.parametrize(
    ("dtype", "merge", "merged"),
    [
        ("bfloat16", None, 0),
        ("bfloat16", "rounded", 14),
        ("bfloat16", "never", 0),
        ("float32", None, 14),
        ("float32", "never", 0),
    ],
)
def test_merging_is_a_setting(dtype: str, merge: str | None, merged: int, tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    settings = ModelConfig(str(tmp_path), dtype=dtype, from_scratch=True, lora=LoraSettings(r=2, merge=merge))
    own = PretrainedModel(settings)
    own.configure_model()
    with own.language_model.frozen():
        off = [part for part in own.model.modules() if isinstance(part, LoraLinear) and part.disable_adapters]
        assert len(off) == merged


def test_bf16_base_is_never_merged_unasked() -> None:
    with merged_adapters(lora(tiny_model(dtype=torch.bfloat16)).modules()) as count:
        assert count == 0


def test_adapted_head_is_scored_through_its_own_forward() -> None:
    model, batch = tiny_model(), ragged_batch()
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    )
    g = torch.Generator().manual_seed(0)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=g) * 0.2
    adapted.eval()
    language_model = LanguageModel(adapted)
    reply = replies(batch)[1]
    (scores,) = language_model.reply_log_probs(
        language_model.embed(batch.prompt_ids), batch.prompt_mask, reply
    )
    ids = torch.cat([batch.prompt_ids[0][batch.prompt_mask[0]], reply.ids[0][reply.mask[0]]])[None]
    own = adapted(input_ids=ids).logits.log_softmax(-1)[0, int(batch.prompt_mask[0].sum()) - 1 : -1]
    torch.testing.assert_close(
        scores[0][reply.mask[0]],
        own.gather(1, reply.ids[0][reply.mask[0], None]).squeeze(1),
        atol=3e-6,
        rtol=0,
    )
