"""Merged weights, model cards, and `thundercat export RUN`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from callbacks.evaluations.refusal import RefusalEvaluation
from callbacks.evaluations.schedule import Schedule
from callbacks.report.model_card import licence, model_card
from callbacks.run_folder.export import ExportModel, is_export, refuse_foreign, save_model
from callbacks.run_folder.folder import RunError
from datamodules.results import ResultsStore
from lightning_modules.models.loading import LoraSettings, ModelConfig, load_seeded
from lightning_modules.models.merging import merged_copy
from tests.conftest import ROOT, tiny_model
from tests.support.rows import measurement, row
from tests.support.small_run import evaluated, small_config
from tests.support.training import data, module, trainer

Run = Callable[..., tuple[int, str, str]]
IDS = torch.arange(40).view(2, 20)
PACKAGED = str(ROOT / "lightning_modules/models/tinychat/aligned")


def adapted(dtype: Any = "float32", **lora: Any) -> nn.Module:
    """The packaged model with adapters that do something, in training mode."""
    config = ModelConfig("tinychat:aligned", dtype=dtype, lora=LoraSettings(**{"r": 4, "alpha": 8, **lora}))
    model = load_seeded(config, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    modes = [(part, part.training) for part in model.modules()]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    for part, training in modes:
        part.training = training
    return found


# --- merging


def test_merged_weights_compute_what_the_adapters_do_and_nothing_in_memory_moves() -> None:
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    flags = [(part.training, [p.requires_grad for p in part.parameters()]) for part in model.modules()]
    expected = logits(model)
    merged = merged_copy(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(PACKAGED, dtype=torch.float32)
    assert (logits(plain) - expected).abs().max() > 0.1
    assert not any("lora" in name for name in merged.state_dict())
    assert set(merged.state_dict()) == set(plain.state_dict())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: value.data_ptr() for name, value in after.items()} == places
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()] == flags
    assert torch.equal(logits(model), expected)
    # Tied embeddings stay one tensor.
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_below_fp32_the_sum_is_rounded_once() -> None:
    model = adapted("bfloat16")
    layer = model.get_base_model().model.layers[0].mlp.up_proj  # type: ignore[operator, union-attr]
    weight, down, up = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (weight.float() + 2.0 * up @ down).to(torch.bfloat16)
    merged = merged_copy(model)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, expected)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16} and merged.dtype == torch.bfloat16
    assert up.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
def test_what_cannot_be_merged_is_said() -> None:
    tied = adapted(target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="merged: expected adapters beside the embeddings, got some on"):
        merged_copy(tied)
    quantised = adapted()
    quantised.get_base_model().is_quantized = True  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="merged: expected a base in float32, .* got a quantised one"):
        merged_copy(quantised)


# --- the callback


def test_a_training_exports_adapters_and_merged_weights(tmp_path: Path) -> None:
    cat = module(LoraSettings(r=4), lr=1e-2)
    trainer(tmp_path, 2, ExportModel(merged=True)).fit(cat, datamodule=data())
    expected = logits(cat.model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model_merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(PACKAGED)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "model")), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "model_merged").chat_template
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model", "model_merged"]


def test_merging_changes_no_training(tmp_path: Path) -> None:
    found = []
    for merged in (False, True):
        cat = module(LoraSettings(r=4))
        export = ExportModel(every_n_steps=1, merged=merged)
        trainer(tmp_path / str(merged), 2, export).fit(cat, datamodule=data())
        found.append({name: p.detach().clone() for name, p in cat.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_where_all_weights_learn_there_is_nothing_to_merge(tmp_path: Path) -> None:
    cat = module()
    trainer(tmp_path, 1, ExportModel(merged=True)).fit(cat, datamodule=data())
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(cat.model))


def test_an_own_folder_takes_the_merged_weights_beside_it(tmp_path: Path) -> None:
    export = ExportModel(folder=str(tmp_path / "out"), merged=True)
    trainer(tmp_path / "run", 1, export).fit(module(LoraSettings(r=2)), datamodule=data())
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert (tmp_path / "out_merged" / "model.safetensors").is_file()
    (tmp_path / "out_merged" / "photos").mkdir()
    with pytest.raises(RunError, match=r"ExportModel.folder: .*out_merged is no earlier export"):
        trainer(tmp_path / "again", 1, export).fit(module(LoraSettings(r=2)), datamodule=data())


def test_a_kill_while_writing_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cat = module(LoraSettings(r=2))
    trainer(tmp_path / "run", 1).fit(cat, datamodule=data())
    folder = tmp_path / "run" / "model_merged"
    save = PreTrainedModel.save_pretrained

    def killed(self: PreTrainedModel, where: Any, **rest: Any) -> None:
        save(self, where, **rest)
        raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", killed)
        with pytest.raises(SystemExit):
            save_model(cat, folder, "card", merged=True)
    assert not folder.exists()
    save_model(cat, folder, "first", merged=True)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", killed)
        with pytest.raises(SystemExit):
            save_model(cat, folder, "second", merged=True)
    assert (folder / "README.md").read_text() == "first"
    save_model(cat, folder, "third", merged=True)
    assert (folder / "README.md").read_text() == "third"
    assert sorted(path.name for path in folder.parent.glob("model*")) == ["model_merged"]


# --- the card


def test_the_card_tells_what_ended_after_the_export(tmp_path: Path) -> None:
    """Training that stops early is evaluated when the model is written already."""
    export = ExportModel()
    late = RefusalEvaluation(Schedule(limit=4), max_new_tokens=4)
    stopped = trainer(tmp_path, 5, export, late)
    stopped.fit_loop.epoch_loop.max_steps = 5
    cat, own = module(), data(evaluation=True)
    stop = StopsAfter(2)
    stopped.callbacks.append(stop)  # type: ignore[attr-defined]
    stopped.fit(cat, datamodule=own)
    text = (tmp_path / "model" / "README.md").read_text()
    assert "after 2 optimiser steps" in text
    assert "| refusals of harmful requests |" in text
    assert "Not evaluated: utility on benign tasks; success of attacks;" in text


class StopsAfter(RefusalEvaluation):
    """Asks for the end after so many steps, and measures nothing."""

    name = "stops"

    def __init__(self, steps: int) -> None:
        super().__init__(Schedule(at_end=False))
        self.steps = steps

    def setup(self, *_: Any, **__: Any) -> None:
        pass

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def test_nothing_recorded_is_said_to_be_so(tmp_path: Path) -> None:
    text = model_card(tmp_path, 0, "whole")
    assert "objective: not recorded" in text and "hardware: not recorded" in text
    assert "Training data: not recorded." in text
    assert "as it was before training" in text
    assert text.count("|") == 0 and "Not evaluated: refusals of harmful requests;" in text
    assert ModelCard(text).data.license is None


def test_the_licence_is_the_base_model_s_own(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    assert licence(str(base)) is None
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    assert licence(str(base)) == "mit"
    (base / "README.md").write_text("no metadata")
    assert licence(str(base)) is None
    assert licence("tinychat:aligned") == "apache-2.0"
    assert licence("nobody/has-this-model") is None


# --- the command line


def test_a_finished_run_is_exported_with_all_that_it_has_measured(thundercat: Run, tmp_path: Path) -> None:
    words = ("--config", str(small_config(tmp_path)), evaluated(4))
    callbacks = [
        {"class_path": "callbacks.run_folder.checkpoints.RunCheckpoints"},
        {"class_path": "callbacks.evaluations.refusal.RefusalEvaluation", "init_args": {"max_new_tokens": 4}},
    ]
    words += (f"--trainer.callbacks={json.dumps(callbacks)}", "--model.base.lora.r=4")
    assert thundercat("fit", *words)[0] == 0
    assert thundercat("test", *words, "--ckpt_path=last")[0] == 0
    run = tmp_path / "run"
    status, out, err = thundercat("export", str(run))
    assert status == 0, err
    assert out.strip() == f"step 3: {run / 'model'}"
    status, out, err = thundercat("export", str(run), "--merged", "--folder", str(tmp_path / "whole"))
    assert status == 0, err
    base = AutoModelForCausalLM.from_pretrained(PACKAGED)
    # Of the exported numbers in float64: what float32 makes of them is another one on another processor.
    own = logits(PeftModel.from_pretrained(base, run / "model").double())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(merged.double()), own, rtol=1e-5, atol=1e-5)
    assert not (run / "lock.json").exists()
    for folder, library in ((run / "model", "peft"), (tmp_path / "whole", "transformers")):
        text = (folder / "README.md").read_text()
        card = ModelCard(text)
        assert (card.data.library_name, card.data.license) == (library, "apache-2.0")
        assert "base_model" not in text.split("---")[1]
        for fact in (
            "base model: name\\_or\\_path tinychat:aligned, lora r 4",
            "attack in training: EmbeddingPGD (epsilon 0.1, num\\_steps 2, ",
            "seed: 0",
            "harmful: TinyChatHarmful (split train",
            "### During training",
            "### By `thundercat test`",
            "| refusals of harmful requests |",
            "Not evaluated: over-refusals of harmless requests; utility on benign tasks; success of attacks;",
        ):
            assert fact.replace("\\_", "_") in text.replace("\\_", "_"), fact
        assert str(tmp_path) not in text
    rows = [line for line in text.splitlines() if line.startswith("| refusals of harmful requests |")]
    assert len(rows) == 2 and all("| 4 |" in row for row in rows)
    status, out, err = thundercat("export", str(run), "--ckpt_path=none", "--folder", str(tmp_path / "base"))
    assert status == 0, err
    text = (tmp_path / "base" / "README.md").read_text()
    assert "as it was before training" in text and "| refusals" not in text


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("nowhere",), 2, "export: no run in 'nowhere' (it has no config.yaml); name a run folder"),
        ((), 2, "the following arguments are required: R"),
        (("RUN", "--folder=RUN"), 1, "--folder: RUN holds the run itself; name a folder of its own"),
        (("RUN", "--folder=PRECIOUS"), 1, "is no earlier export (it holds photos) and would be replaced"),
        (("RUN", "--merged"), 2, "--merged: expected a run that trained adapters, got one without"),
        (("RUN", "--ckpt_path=no.ckpt"), 1, "no.ckpt"),
    ],
)
def test_wrong_calls_are_one_line(
    thundercat: Run, whole_run: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    (whole_run.parent / "precious" / "photos").mkdir(parents=True, exist_ok=True)
    places = {"RUN": str(whole_run), "PRECIOUS": str(whole_run.parent / "precious")}
    for name, place in places.items():
        words, message = tuple(w.replace(name, place) for w in words), message.replace(name, place)
    found, _, err = thundercat("export", *words)
    assert found == status, err
    assert message in err.splitlines()[-1] and err.count("thundercat: ") == 1
    assert (whole_run.parent / "precious" / "photos").is_dir()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in which all weights learned."""
    from experiments.cli import main

    folder = tmp_path_factory.mktemp("whole")
    assert main(["fit", "--config", str(small_config(folder)), "--model.base.lora=null"]) == 0
    return folder / "run"


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    """A base model's folder looks like an export, and the adapters may need it."""
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    assert not is_export(model)
    with pytest.raises(
        RunError, match="model is no earlier export .* would be replaced; name another folder"
    ):
        refuse_foreign(model, tmp_path / "run", "--folder")
    (model / "README.md").write_text("---\ntags: [thundercat]\n---\n")
    assert is_export(model)
    refuse_foreign(model, tmp_path / "run", "--folder")


def test_a_card_tells_only_of_its_own_weights(tmp_path: Path) -> None:
    plan = measurement("exact_match", stage="test", step=0, subject="utility", model="other")
    store = ResultsStore(tmp_path)
    store.announce([plan])
    store.add([row("a", plan, True)])
    assert "utility: exact match" in model_card(tmp_path, 0, "whole", weights="other")
    card = model_card(tmp_path, 0, "whole", weights="own")
    assert "utility: exact match" not in card and "Not evaluated: " in card
    assert "as it was before training; by Thundercat" in card
    assert "refuse harmful requests under the attack" not in card
