"""Preference losses: hand-derived values, gradients, and CAPO against a plain PyTorch loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.base import OptimizerConfig
from lightning_modules.losses.base import LossTerms, ReferenceScores, ReplyScores
from lightning_modules.losses.preference import FORMS, Preference, npo
from lightning_modules.models.frozen import FrozenCopy
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.models.loading import LoraSettings, ModelConfig
from tests.conftest import ROOT
from tests.support.training import (
    ATTACK,
    Batches,
    Computed,
    Gradients,
    InDouble,
    data,
    double_norm,
    gradients,
    trainer,
    weights,
)

LORA = LoraSettings(r=4, dropout=0.0)
TINYCHAT = ModelConfig("tinychat:aligned")


def two_tokens(reference: ReferenceScores | None) -> ReplyScores:
    """lp(y) = (-1 - 3) / 2 = -2 and lp(y_hat) = (-0.5 - 1.5) / 2 = -1; the padding must not count."""
    mask = torch.tensor([[True, True, False]])
    safe, harmful = (
        torch.tensor([row], dtype=torch.float64, requires_grad=True)
        for row in ([-1.0, -3.0, -9.0], [-0.5, -1.5, -9.0])
    )
    return ReplyScores(safe, mask, harmful, mask, reference)


# lp0(y) - lp0(y_hat) = -1.5 + 2.5 = 1, so h = (-2 + 1) - 1 = -2; lp(y_hat) - lp0(y_hat) = -1 + 2.5 = 1.5.
REFERENCE = ReferenceScores(torch.tensor([-1.5]), torch.tensor([-2.5]))


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Preference("ipo", 0.25), 16.0),  # (-2 - 2)^2
        (Preference("sigmoid", 0.1), math.log(1 + math.exp(0.2))),  # -log sigmoid(-0.2)
        (Preference("hinge", 1.0), 3.0),  # 1 + 2
        (Preference("npo", 0.1), 20 * math.log(1 + math.exp(0.15))),  # -(2 / 0.1) log sigmoid(-0.15)
        (Preference("npo", 0.1, weight_toward=0.5), 20 * math.log(1 + math.exp(0.15)) + 1.0),  # + 0.5 * 2
    ],
)
def test_forms_by_hand(objective: Preference, expected: float) -> None:
    terms = objective.adversarial(two_tokens(REFERENCE))
    assert terms.loss.item() == pytest.approx(expected, rel=1e-7)
    assert terms.parts["margin"].item() == pytest.approx(-2.0)
    assert not any(part.requires_grad for part in terms.parts.values())


def test_gradient_of_ipo_by_hand() -> None:
    # d/dh (h - 2)^2 = 2 (-2 - 2) = -8, shared by the two tokens of each reply: -4 on the safe ones, +4 on the
    # harmful ones.
    scores = two_tokens(REFERENCE)
    safe, harmful = torch.autograd.grad(
        Preference().adversarial(scores).loss.sum(), [scores.safe_log_probs, scores.harmful_log_probs]
    )
    torch.testing.assert_close(safe, torch.tensor([[-4.0, -4.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(harmful, torch.tensor([[4.0, 4.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("form", [*FORMS.values(), npo])
def test_forms_by_finite_differences(form: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    margins = torch.tensor([-3.0, -0.4, 0.2, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda margin: form(margin, 0.3), (margins,))


def test_wrong_settings_and_a_missing_reference_say_so() -> None:
    with pytest.raises(ValueError, match=r"Preference.beta: expected a number > 0, got 0"):
        Preference(beta=0.0)
    with pytest.raises(ValueError, match=r"Preference.weight_utility: expected a number >= 0, got -1"):
        Preference(weight_utility=-1.0)
    with pytest.raises(ValueError, match="expected reference log-probabilities, got none"):
        Preference().adversarial(two_tokens(None))


# --- the training step


def capo(lora: LoraSettings | None, **fields: Any) -> AdversarialFineTuning:
    optimizer = OptimizerConfig(lr=1e-3, warmup_fraction=0.0, schedule="constant")
    config = ModelConfig("tinychat:aligned", lora=lora)
    return AdversarialFineTuning(config, EmbeddingPGD(**ATTACK), Preference(), optimizer=optimizer, **fields)


def plain_capo(
    batches: list[Any], micro_batches: int, lora: bool, start: dict[str, torch.Tensor]
) -> Computed:
    """CAPO as one would write it from the paper: full logits, one forward per reply and example, the
    reference asked every time."""
    path = str(ROOT / "lightning_modules/models/tinychat/aligned")
    model, frozen = (AutoModelForCausalLM.from_pretrained(path).double() for _ in range(2))
    if lora:
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        ).double()
    model.load_state_dict(start, strict=False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.0)
    computed = Computed({}, [], [])

    def log_prob(net: Any, embeds: torch.Tensor, reply: torch.Tensor) -> torch.Tensor:
        embeds = torch.cat([embeds, net.get_input_embeddings()(reply)])
        return -cross_entropy(net(inputs_embeds=embeds[None]).logits[0, -len(reply) - 1 : -1], reply)

    for number, batch in enumerate(batches):
        a, total = batch.adversarial, torch.zeros((), dtype=torch.float64)
        for i in range(len(a)):
            prompt, span = a.prompt_ids[i][a.prompt_mask[i]], a.attackable_mask[i][a.prompt_mask[i]]
            harmful, safe = a.harmful_ids[i][a.harmful_mask[i]], a.safe_ids[i][a.safe_mask[i]]
            table = model.get_input_embeddings()
            clean, radius = table(prompt), 0.1 * table.weight.detach().norm(dim=1).mean()
            delta = torch.zeros_like(clean)
            for _ in range(3):
                delta = delta.detach().requires_grad_()
                (g,) = torch.autograd.grad(-log_prob(model, clean.detach() + delta, harmful), delta)
                g = g * span[:, None]
                delta = delta.detach() - 0.5 * radius * g / g.norm(dim=1, keepdim=True).clamp_min(1e-38)
                delta = delta * (radius / delta.norm(dim=1, keepdim=True).clamp_min(1e-38)).clamp_max(1.0)
            with torch.no_grad():
                untouched = frozen.get_input_embeddings()(prompt)
                preference = log_prob(frozen, untouched, safe) - log_prob(frozen, untouched, harmful)
            margin = (
                log_prob(model, clean + delta, safe) - log_prob(model, clean + delta, harmful) - preference
            )
            total = total + (margin - 2.0) ** 2 / len(a)
        (total / micro_batches).backward()
        computed.losses.append(total.item())
        if (number + 1) % micro_batches == 0:
            computed.gradients.append(gradients(model))
            torch.nn.utils.clip_grad_norm_(learning, 0.3)
            optimizer.step()
            optimizer.zero_grad()
    computed.weights = {name: p.detach() for name, p in model.named_parameters()}
    return computed


@pytest.mark.parametrize(("lora", "micro_batches"), [(True, 1), (True, 2), (False, 2)])
def test_three_steps_equal_a_plain_loop(
    tmp_path: Path, lora: bool, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", double_norm)
    # The module's frozen copy must be in float64 like the rest.
    monkeypatch.setattr(FrozenCopy, "active", in_double(FrozenCopy.active))
    seen, module = Batches(), capo(LORA if lora else None)
    module.configure_model()
    start = {name: p.detach().double() for name, p in module.model.state_dict().items()}
    no_utility = data(micro_batches, num_harmful=40, utility_per_step=0)
    trainer(tmp_path, 3, seen, found := Gradients(), InDouble(), micro_batches=micro_batches).fit(
        module, datamodule=no_utility
    )
    expected = plain_capo(seen.batches, micro_batches, lora, start)
    assert len(seen.batches) == 3 * micro_batches
    for name, value in weights(module).items():
        torch.testing.assert_close(value, expected.weights[name], atol=1e-6, rtol=0)
        assert not torch.equal(value, start[name]), name
    assert seen.losses == pytest.approx(expected.losses, rel=0, abs=1e-6)
    for ours, plain in zip(found.steps, expected.gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)


def in_double(active: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def wrapped(self: FrozenCopy, like: LanguageModel) -> Any:
        with active(self, like) as language_model:
            language_model.module.double()
            yield language_model

    return wrapped


def test_the_cache_is_shared_and_a_run_says_where_it_is(tmp_path: Path) -> None:
    for name in ("first", "second"):
        trainer(tmp_path / name, 1).fit(
            capo(LORA, reference_cache=str(tmp_path / "shared")),
            datamodule=data(num_harmful=40, utility_per_step=0),
        )
    assert len(list((tmp_path / "shared").glob("*.json"))) == 1
    trainer(tmp_path / "own", 1).fit(capo(None), datamodule=data(num_harmful=40, utility_per_step=0))
    assert len(list((tmp_path / "own" / "reference").glob("*.json"))) == 1


# --- how to add an objective: lightning_modules/README.md's example, whole


class Contrast:
    """log(1 + exp(CE(y) - CE(y_hat))): the safe reply must be likelier than the harmful one under attack."""

    needs_reference = False

    def __init__(self, weight_utility: float = 1.0) -> None:
        self.weight_utility = weight_utility

    def adversarial(self, scores: ReplyScores) -> LossTerms:
        toward = mean_cross_entropy(scores.safe_log_probs, scores.safe_mask)
        away = mean_cross_entropy(scores.harmful_log_probs, scores.harmful_mask)
        return LossTerms(
            torch.nn.functional.softplus(toward - away),
            {"loss_toward": toward.detach(), "loss_away": -away.detach()},
        )

    def utility(self, log_probs: torch.Tensor, mask: torch.Tensor) -> LossTerms:
        loss = mean_cross_entropy(log_probs, mask)
        return LossTerms(self.weight_utility * loss, {"loss_utility": loss.detach()})


def test_a_new_objective_is_one_class_and_a_class_path(
    tmp_path: Path, thundercat: Callable[..., tuple[int, str, str]]
) -> None:
    # softplus(ln 4 - ln 2) = ln(1 + 2) at p(y) = 1/4 and p(y_hat) = 1/2.
    one = torch.ones(1, 1, dtype=torch.bool)
    terms = Contrast().adversarial(
        ReplyScores(torch.tensor([[0.25]]).log(), one, torch.tensor([[0.5]]).log(), one)
    )
    assert terms.loss.item() == pytest.approx(math.log(3))
    status, _, error = thundercat(
        "fit",
        "--config",
        "configs/experiment/methods_tinychat.yaml",
        "--config",
        "configs/method/cat.yaml",
        "--model.objective=tests.lightning_modules.test_preference.Contrast",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.max_steps=2",
        "--trainer.callbacks=[]",
        "--trainer.enable_checkpointing=false",
        "--data.harmful.0.num_rows=60",
        "--data.utility.0.num_rows=120",
    )
    assert status == 0, error
    assert "train/loss_toward" in (tmp_path / "csv" / "metrics.csv").read_text()
