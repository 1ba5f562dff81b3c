"""Loading models: what learns, in which dtype, from where; and that the cheap paths stay cheap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.models import decoder
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import LoraSettings, ModelConfig, has_adapter, load_model
from lightning_modules.models.reply import Reply
from tests.conftest import ragged_batch, tiny_model, utility


def test_full_fine_tuning_learns_everything_in_train_mode() -> None:
    model = load_model(ModelConfig("tinychat:aligned"))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not has_adapter(model)


def test_adapters_are_fp32_on_a_bf16_base() -> None:
    model = load_model(ModelConfig("tinychat:aligned", dtype="bfloat16", lora=LoraSettings(r=2)))
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in learning.items())
    assert {p.dtype for name, p in model.named_parameters() if name not in learning} == {torch.bfloat16}


def test_adapters_of_some_layers_on_all_their_linear_parts() -> None:
    model = load_model(ModelConfig("tinychat:aligned", lora=LoraSettings(r=2, layers=[1])))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split("layers.")[1].split(".")[0] for name in learning} == {"1"}
    parts = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in learning} == set(parts)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"target_modules": ["q_proj", "nothing"]},
            r"target_modules: .*'down_proj'.*, got \['q_proj'",
        ),
        ({"target_modules": "q_prj"}, "target_modules: .*'down_proj'.*, got 'q_prj'"),
        ({"layers": [0, 99]}, r"layers: expected numbers below \d+, the model's layers, got 99"),
    ],
)
def test_adapters_on_what_is_not_there_are_refused(settings: dict[str, Any], said: str) -> None:
    """PEFT passes over a name that is not there, if another one is."""
    with pytest.raises(ValueError, match=f"base.lora.{said}"):
        load_model(ModelConfig("tinychat:aligned", lora=LoraSettings(**settings)))


def test_saved_adapters_go_on_learning(tmp_path: Path) -> None:
    first = load_model(ModelConfig("tinychat:aligned", lora=LoraSettings(r=2)))
    for name, p in first.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.01)
    first.save_pretrained(tmp_path)  # type: ignore[operator]
    second = load_model(ModelConfig(str(tmp_path)))
    ids = torch.arange(8)[None]
    assert torch.equal(first.eval()(input_ids=ids).logits, second.eval()(input_ids=ids).logits)
    assert {n for n, p in second.named_parameters() if p.requires_grad} == {
        n for n, p in first.named_parameters() if p.requires_grad
    }
    with pytest.raises(ValueError, match="base.lora: expected null for the saved adapters"):
        load_model(ModelConfig(str(tmp_path), lora=LoraSettings()))


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = load_model(
            ModelConfig(
                "tinychat:aligned", gradient_checkpointing=checkpointing, lora=LoraSettings(r=2, dropout=0.0)
            )
        )
        assert model.base_model.model.is_activation_checkpointing is checkpointing  # type: ignore[union-attr]
        batch = utility()
        scores, _ = LanguageModel(model).labelled_log_probs(
            batch.input_ids, batch.attention_mask, batch.labels
        )
        scores.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_random_weights_and_configuration_overrides() -> None:
    config = ModelConfig("tinychat:base", from_scratch=True, config={"num_hidden_layers": 1})
    assert len(load_model(config).model.layers) == 1  # type: ignore[union-attr,arg-type]
    with pytest.raises(ValueError, match="base.config.layers: expected a field of LlamaConfig"):
        load_model(ModelConfig("tinychat:base", from_scratch=True, config={"layers": 1}))


def test_real_pretrained_model_tells_its_story(public_data: Path) -> None:
    model = load_model(ModelConfig(str(public_data / "models" / "stories260K"))).eval()
    batch = ragged_batch()
    attacked = EmbeddingPGD(epsilon=0.1, num_steps=3)(LanguageModel(model), batch)
    assert (attacked.best_loss < attacked.start_loss).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation: str) -> None:
    config = ModelConfig("tinychat:aligned", attn_implementation=implementation)  # type: ignore[arg-type]
    model = load_model(config).eval()
    batch = ragged_batch()
    replies = Reply(batch.safe_ids, batch.safe_mask), Reply(batch.harmful_ids, batch.harmful_mask)
    together = LanguageModel(model).reply_log_probs(
        LanguageModel(model).embed(batch.prompt_ids), batch.prompt_mask, *replies
    )
    apart = LanguageModel(model, share_prompt=False).reply_log_probs(
        LanguageModel(model).embed(batch.prompt_ids), batch.prompt_mask, *replies
    )
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_only_reply_tokens_meet_the_output_head(monkeypatch: pytest.MonkeyPatch) -> None:
    # Trap: full-vocabulary logits at every position in every iteration.
    rows: list[int] = []
    scored = decoder.token_log_probs

    def count(hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(len(hidden))
        return scored(hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "token_log_probs", count)
    batch = ragged_batch()
    EmbeddingPGD(num_steps=3, keep="last")(LanguageModel(tiny_model()), batch)
    assert rows == [int(batch.harmful_mask.sum())] * 3


def test_embeddings_are_gathered_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    # Trap: one-hot x embedding, 90 to 290 times slower.
    def never(*_: object, **__: object) -> None:
        raise AssertionError("one_hot was used")

    monkeypatch.setattr(torch.nn.functional, "one_hot", never)
    language_model, calls = LanguageModel(tiny_model()), []
    causal_lm(language_model.module).get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    EmbeddingPGD(num_steps=4, keep="last")(language_model, ragged_batch())
    # The norm, and prompt and reply once for all four iterations.
    assert len(calls) == 2


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name_or_path: cannot load the model '.*': Unrecognized model"):
        load_model(ModelConfig(str(tmp_path)))
