"""The training step against a plain PyTorch loop, a golden curve, resuming, and callbacks that must not
disturb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from callbacks.evaluations.refusal import RefusalEvaluation
from callbacks.evaluations.robustness import RobustnessEvaluation
from callbacks.evaluations.schedule import Schedule
from callbacks.evaluations.utility import UtilityEvaluation
from callbacks.report.training_log import read_training_log
from callbacks.run_folder.export import ExportModel
from callbacks.run_folder.loggers import LastLogRow, RunCSVLogger
from datamodules.adversarial import AdversarialData
from datamodules.batch import TrainingBatch
from datamodules.results import read_measurements
from datamodules.sources.combinators import AnsweredRequests
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.text.tokenizers import TokenizerConfig
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.base import Attack, NoAttack
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.base import OptimizerConfig
from lightning_modules.losses.toward_away import TowardAwayUtility
from lightning_modules.models.loading import LoraSettings, ModelConfig
from lightning_modules.supervised import SupervisedFineTuning
from tests.conftest import ROOT
from tests.support.training import (
    Batches,
    Computed,
    Gradients,
    InDouble,
    data,
    double_norm,
    gradients,
    module,
    trainer,
    weights,
)

GOLDEN = ROOT / "tests" / "golden" / "cat_tinychat_20_steps.json"


def plain_cat(batches: list[TrainingBatch], micro_batches: int) -> Computed:
    """CAT as one would write it from the paper: full logits, separate forwards, a loop per example."""
    model = AutoModelForCausalLM.from_pretrained(
        str(ROOT / "lightning_modules/models/tinychat/aligned")
    ).double()
    embedding = model.get_input_embeddings()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    computed = Computed({}, [], [])

    def reply_loss(embeds: torch.Tensor, prompt: int, reply: torch.Tensor) -> torch.Tensor:
        logits = model(inputs_embeds=embeds[None]).logits[0, prompt - 1 : -1]
        return cross_entropy(logits, reply)

    def cut(loss: torch.Tensor, cutoff: float) -> torch.Tensor:
        return loss if loss >= cutoff else 0.999 * cutoff + 0.001 * loss

    for number, batch in enumerate(batches):
        a, u = batch.adversarial, batch.utility
        assert a is not None
        assert u is not None
        total = torch.zeros((), dtype=torch.float64)
        model.eval()
        for i in range(len(a)):
            prompt, span = a.prompt_ids[i][a.prompt_mask[i]], a.attackable_mask[i][a.prompt_mask[i]]
            harmful, safe = a.harmful_ids[i][a.harmful_mask[i]], a.safe_ids[i][a.safe_mask[i]]
            radius = 0.1 * embedding.weight.detach().norm(dim=1).mean()
            delta = torch.zeros(len(prompt), embedding.weight.shape[1], dtype=torch.float64)
            for _ in range(3):
                delta.requires_grad_()
                embeds = torch.cat([embedding(prompt).detach() + delta, embedding(harmful).detach()])
                (g,) = torch.autograd.grad(reply_loss(embeds, len(prompt), harmful), delta)
                g = g * span[:, None]
                delta = delta.detach() - 0.5 * radius * g / g.norm(dim=1, keepdim=True).clamp_min(1e-38)
                delta = delta * (radius / delta.norm(dim=1, keepdim=True).clamp_min(1e-38)).clamp_max(1.0)
            both = [torch.cat([embedding(prompt) + delta, embedding(reply)]) for reply in (safe, harmful)]
            toward, away = reply_loss(both[0], len(prompt), safe), -reply_loss(both[1], len(prompt), harmful)
            total = total + (0.5 * cut(toward, 0.05) + 0.5 * cut(away, -2.0)) / len(a)
        model.train()
        for i in range(len(u)):
            ids, labels = u.input_ids[i][u.attention_mask[i]], u.labels[i][u.attention_mask[i]]
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total = total + cross_entropy(logits, labels[1:], ignore_index=-100) / len(u)
        (total / micro_batches).backward()
        computed.losses.append(total.item())
        if (number + 1) % micro_batches == 0:
            computed.gradients.append(gradients(model))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
    computed.weights = {name: p.detach() for name, p in model.named_parameters()}
    return computed


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_three_steps_equal_a_plain_loop(
    tmp_path: Path, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traps: weight gradients leaking from the inner loop show at accumulation 2; padding, masks and cutoffs
    # at 1.
    monkeypatch.setattr(LlamaRMSNorm, "forward", double_norm)
    seen, cat = Batches(), module()
    trainer(tmp_path, 3, seen, found := Gradients(), InDouble(), micro_batches=micro_batches).fit(
        cat, datamodule=data(micro_batches)
    )
    expected = plain_cat(seen.batches, micro_batches)
    assert len(seen.batches) == 3 * micro_batches
    for name, value in weights(cat).items():
        torch.testing.assert_close(value, expected.weights[name], atol=1e-6, rtol=0)
    assert seen.losses == pytest.approx(expected.losses, rel=0, abs=1e-6)
    for ours, plain in zip(found.steps, expected.gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)


class Attacks(Callback):
    """Keeps what each micro-batch's attack found, and counts the attack's calls."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.calls = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        attack = pl_module.attack

        def counted(*arguments: Any) -> Any:
            self.calls += 1
            return attack(*arguments)

        pl_module.attack = counted

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *rest: Any) -> None:
        self.found.append(outputs["attacked"])


# How 4 + 8 rows are divided, and in how many calls of the attack.
DIVISIONS: dict[str, tuple[dict[str, int], int]] = {
    "attacked at once": ({"micro_batches": 2}, 1),
    "attacked apart": ({"micro_batches": 2, "attack_batch": 2}, 2),
    "streams apart": ({"micro_batches": 3, "outer_batch": 4, "utility_batch": 4}, 1),
    "streams overlap": ({"micro_batches": 4, "outer_batch": 2, "utility_batch": 2, "attack_batch": 4}, 1),
}


def test_a_step_s_gradient_does_not_depend_on_how_it_is_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", double_norm)

    def fit(micro_batches: int = 1, **division: int) -> tuple[Gradients, Attacks, float]:
        found, attacks, seen = Gradients(), Attacks(), Batches()
        cat = module(random_start=True)
        callbacks = attacks, found, seen, InDouble()
        trainer(tmp_path, 2, *callbacks, micro_batches=micro_batches).fit(
            cat, datamodule=data(micro_batches, **division)
        )
        return found, attacks, sum(seen.losses) / micro_batches

    whole, once, loss = fit()
    assert once.calls == 2
    for name, (division, calls) in DIVISIONS.items():
        found, attacks, own_loss = fit(**division)
        assert attacks.calls == 2 * calls, name
        assert own_loss == pytest.approx(loss, rel=1e-6), name
        for ours, expected in zip(found.steps, whole.steps, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_what_is_logged_of_a_step_is_its_mean(tmp_path: Path) -> None:
    rows = []
    for division in ({}, DIVISIONS["streams apart"][0]):
        folder, micro_batches = tmp_path / str(len(rows)), division.get("micro_batches", 1)
        logging: dict[str, Any] = {"logger": RunCSVLogger(str(folder)), "log_every_n_steps": 1}
        fields = {name: value for name, value in division.items() if name != "micro_batches"}
        trainer(folder, 1, LastLogRow(), micro_batches=micro_batches, **logging).fit(
            module(), datamodule=data(micro_batches, **fields)
        )
        rows += read_training_log(folder)
    for name in ("train/loss", "train/loss_toward", "train/loss_away", "train/loss_utility"):
        assert float(rows[1][name]) == pytest.approx(float(rows[0][name]), rel=1e-4), name


def test_golden_curve(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seen = Batches()
    lora = LoraSettings(r=8, dropout=0.1)
    trainer(tmp_path, 20, seen).fit(module(lora, lr=5e-3), datamodule=data())
    if request.config.getoption("--regenerate"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps([round(loss, 6) for loss in seen.losses]) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert seen.losses == pytest.approx(golden, abs=2e-4)
    assert sum(seen.losses[-5:]) < sum(seen.losses[:5])


class StopAfter(Callback):
    """Interrupts training as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True
            trainer.limit_train_batches = 0
            raise KeyboardInterrupt


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4, dropout=0.1)])
def test_resume_is_bit_exact(tmp_path: Path, lora: LoraSettings | None) -> None:
    whole = module(lora)
    trainer(tmp_path / "whole", 6, micro_batches=2).fit(whole, datamodule=data(2))

    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "parts", every_n_train_steps=1, save_last=True, save_top_k=0)

    with pytest.raises(SystemExit):
        first = trainer(
            tmp_path / "parts", 6, checkpoint(), StopAfter(3), micro_batches=2, enable_checkpointing=True
        )
        first.fit(module(lora), datamodule=data(2))
    second = module(lora)
    resumed = trainer(tmp_path / "parts", 6, checkpoint(), micro_batches=2, enable_checkpointing=True)
    resumed.fit(second, datamodule=data(2), ckpt_path=tmp_path / "parts" / "last.ckpt")
    assert resumed.global_step == 6
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(second).items())


class StopsOnceSaved(ModelCheckpoint):
    """Ends the run between a step's checkpoint and its row in the log."""

    stop_at: int | None = None

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        if trainer.global_step == self.stop_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_run_ended_between_checkpoint_and_log_row_resumes_without_a_hole(
    tmp_path: Path, micro_batches: int
) -> None:
    def fit(folder: Path, stop_at: int | None = None, ckpt_path: Path | None = None) -> None:
        checkpoint = StopsOnceSaved(folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        checkpoint.stop_at = stop_at
        logging: dict[str, Any] = {
            "logger": RunCSVLogger(str(folder)),
            "log_every_n_steps": 1,
            "enable_checkpointing": True,
        }
        running = trainer(folder, 3, LastLogRow(), checkpoint, micro_batches=micro_batches, **logging)
        running.fit(module(), datamodule=data(micro_batches), ckpt_path=ckpt_path)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole)
    with pytest.raises(SystemExit):
        fit(parts, stop_at=2)
    assert [row["step"] for row in read_training_log(parts)] == ["0"]
    fit(parts, ckpt_path=parts / "last.ckpt")
    assert read_training_log(parts) == read_training_log(whole)


def test_adapter_checkpoint_holds_adapters_only_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, save_top_k=0)
    trainer(tmp_path, 1, checkpoint, enable_checkpointing=True).fit(
        module(LoraSettings(r=4)), datamodule=data()
    )
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)
    with pytest.raises(ValueError, match="the checkpoint does not fit this model: .* weights missing"):
        trainer(tmp_path, 2).fit(module(), datamodule=data(), ckpt_path=tmp_path / "last.ckpt")


def test_export_is_peft_s_own_format(tmp_path: Path) -> None:
    cat = module(LoraSettings(r=4))
    trainer(tmp_path, 2, ExportModel(every_n_steps=1)).fit(cat, datamodule=data())
    base = AutoModelForCausalLM.from_pretrained(str(ROOT / "lightning_modules/models/tinychat/aligned"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "model").eval()
    ids = torch.arange(10)[None]
    cat.model.eval()
    assert torch.equal(loaded(input_ids=ids).logits, cat.model(input_ids=ids).logits)
    assert (tmp_path / "model_step_000001" / "adapter_config.json").is_file()
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_evaluation_callbacks_do_not_disturb_training(tmp_path: Path) -> None:
    attacks: dict[str, Attack] = {
        "embedding": EmbeddingPGD(epsilon=0.1, num_steps=2, random_start=True),
        "gcg": GCG(num_tokens=4, num_steps=2, width=4),
    }
    evaluations = (
        RefusalEvaluation(Schedule(every_n_steps=1, at_start=True, limit=4), max_new_tokens=4),
        UtilityEvaluation(Schedule(every_n_steps=1, limit=4), max_new_tokens=4),
        RobustnessEvaluation(attacks, schedule=Schedule(every_n_steps=1, limit=4), max_new_tokens=4),
    )
    results = []
    for callbacks in ((), evaluations):
        seed_everything(1 + len(callbacks), verbose=False)  # the run's own seeds must win over the global one
        cat = module(LoraSettings(r=4, dropout=0.2))
        trainer(tmp_path, 3, *callbacks, micro_batches=2).fit(cat, datamodule=data(2, evaluation=True))
        results.append(weights(cat))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    measured = {(item.evaluation, item.step) for item in read_measurements(tmp_path)}
    assert {("refusal", 0), ("refusal", 1), ("utility", 1), ("robustness", 3)} <= measured


def test_no_attack_and_one_step_are_settings_of_the_same_module(tmp_path: Path) -> None:
    none, one = Attacks(), Attacks()
    cat = AdversarialFineTuning(ModelConfig("tinychat:aligned"), NoAttack(), TowardAwayUtility())
    trainer(tmp_path, 2, none).fit(cat, datamodule=data())
    trainer(tmp_path, 2, one).fit(module(num_steps=1, step_size=1.0, step_rule="sign"), datamodule=data())
    assert [len(attacks.found) for attacks in (none, one)] == [2, 2]
    assert all(attacked.delta is None and not attacked.backward_passes.any() for attacked in none.found)
    assert all(attacked.delta.abs().amax() > 0 for attacked in one.found)
    assert all((attacked.backward_passes == 1).all() for attacked in one.found)


def test_supervised_fine_tuning_learns_and_refuses_harmful_rows(tmp_path: Path) -> None:
    seen = Batches()
    requests = AnsweredRequests(TinyChatHarmful("train"), "safe")
    stage = SupervisedFineTuning(ModelConfig("tinychat:helpful"), OptimizerConfig(lr=1e-3))
    supervised = AdversarialData(
        TokenizerConfig("tinychat:helpful"), utility=[requests], harmful_per_step=0, utility_per_step=16
    )
    trainer(tmp_path, 12, seen).fit(stage, datamodule=supervised)
    assert sum(seen.losses[-3:]) < 0.5 * sum(seen.losses[:3])
    with pytest.raises(ValueError, match="set data.harmful_per_step: 0"):
        trainer(tmp_path, 1).fit(SupervisedFineTuning(ModelConfig("tinychat:helpful")), datamodule=data())


def test_diverging_loss_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="lower optimizer.lr"):
        trainer(tmp_path, 6).fit(module(lr=1e30), datamodule=data())
