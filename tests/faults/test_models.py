"""Findings of the audit about models: what cannot be loaded is named, half precision runs, passes are counted
where they happen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datamodules.text.model_files import resolve_path
from lightning_modules.models.chat import Endpoint
from lightning_modules.models.language_model import Attacked, LanguageModel, Replier
from lightning_modules.models.loading import LoraSettings, ModelConfig, load_model
from lightning_modules.models.passes import PassCounter
from lightning_modules.models.reply import Reply
from lightning_modules.models.requests import GREEDY, Decoding, Request
from tests.conftest import chat_model, ragged_batch, text_batch, tiny_model

Run = Callable[..., tuple[int, str, str]]


def fit(thundercat: Run, folder: Path, *more: str) -> dict[str, float]:
    """Two steps; returns the run's cost."""
    configs = [word for name in more if name.endswith(".yaml") for word in ("--config", name)]
    overrides = [name for name in more if not name.endswith(".yaml")]
    arguments = ["--config", "tests/configs/short_training.yaml", *configs, *overrides]
    status, _, err = thundercat("fit", *arguments, f"--trainer.default_root_dir={folder}")
    assert status == 0, err
    cost: dict[str, float] = json.loads((folder / "cost.json").read_text())
    return cost


# --- A19: cost


def test_a19_reference_passes_are_counted(tmp_path: Path, thundercat: Run) -> None:
    """CAPO without attack: 2 steps x 8 rows x 2 replies, forward and backward, are 64 passes. Before them the
    reference scores both replies of all 100 rows (200), and the check those of one batch of 64 (128).

    With the 60 steps of the methods' comparison the steps' own passes are 1,920, which alone were reported.
    """
    own = (
        "configs/method/capo.yaml",
        "configs/attack/none.yaml",
        f"--model.reference_cache={tmp_path}/cache",
    )
    assert fit(thundercat, tmp_path / "first", *own)["passes"] == 64 + 200 + 128
    # What another run has computed already costs this one nothing.
    assert fit(thundercat, tmp_path / "second", *own)["passes"] == 64 + 128


def test_a19_a_shared_prompt_saves_time_not_passes() -> None:
    batch = ragged_batch()
    replies = Reply(batch.safe_ids, batch.safe_mask), Reply(batch.harmful_ids, batch.harmful_mask)
    counted = []
    for share in (True, False):
        model = LanguageModel(tiny_model(), share_prompt=share)
        with PassCounter() as passes:
            safe, harmful = model.reply_log_probs(model.embed(batch.prompt_ids), batch.prompt_mask, *replies)
        assert (passes.forward, passes.backward) == (2 * 3, 0)
        # Counted when it happens, though the counter is closed.
        (safe.sum() + harmful.sum()).backward()
        counted.append((passes.forward, passes.backward, passes.total))
    assert counted == [(6, 6, 12)] * 2


def test_a19_counters_nest_and_frozen_models_cost_no_backward() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    reply = Reply(batch.safe_ids, batch.safe_mask)
    with PassCounter() as outer:
        with model.frozen(), PassCounter() as inner:
            model.reply_log_probs(model.embed(batch.prompt_ids), batch.prompt_mask, reply)
        model.reply_log_probs(model.embed(batch.prompt_ids), batch.prompt_mask, reply)
    model.reply_log_probs(model.embed(batch.prompt_ids), batch.prompt_mask, reply)
    assert (inner.total, outer.total) == (3, 6)


# --- B: precision


@pytest.mark.parametrize("lora", [False, True])
def test_b_bf16_true_trains(tmp_path: Path, thundercat: Run, lora: bool) -> None:
    """Lightning rebuilds batches field by field there, which frozen dataclasses refused."""
    adapters = ["--model.base.lora.r=4"] if lora else []
    cost = fit(
        thundercat,
        tmp_path,
        "configs/method/cat.yaml",
        "configs/attack/one_step.yaml",
        "--trainer.precision=bf16-true",
        *adapters,
    )
    assert cost["steps"] == 2


# --- B: models that cannot be loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the packaged model to damage."""
    return Path(shutil.copytree(resolve_path("tinychat:aligned"), tmp_path / "model"))


def refusal(path: str | Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load_model(ModelConfig(str(path)))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", ["/no/such/folder", "./model", "one/two/three", "a model"])
def test_b_a_wrong_model_path_is_one_line(path: str) -> None:
    assert refusal(path) == (
        f"name_or_path: no model {path!r}; give a folder, a hub id (owner/name) or tinychat:<stage>"
    )


def test_b_pickled_weights_are_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04junk")
    assert f"the model {str(folder)!r} holds its weights as a pickle (pytorch_model.bin)" in refusal(folder)


def test_b_pickled_adapters_are_refused_by_name(tmp_path: Path) -> None:
    model = load_model(ModelConfig("tinychat:aligned", lora=LoraSettings(r=2)))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "holds its weights as a pickle (adapter_model.bin)" in refusal(tmp_path)


@pytest.mark.parametrize("length", [0, 7, 5000])
def test_b_truncated_weights_are_named(folder: Path, length: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    assert f"the weights of the model {str(folder)!r} are damaged or cut short" in refusal(folder)


def test_b_a_missing_extra_names_a_command_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes, or set it to null"):
        ModelConfig("m", quantization="nf4", lora=LoraSettings())
    with pytest.raises(ValueError, match="flash_attention_2 needs flash-attn, which is not installed"):
        ModelConfig("m", attn_implementation="flash_attention_2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"LoraSettings.r: expected an integer >= 1, got 0"),
        ({"dropout": float("nan")}, r"LoraSettings.dropout: expected a number within \[0, 1\), got nan"),
        ({"layers": [-1]}, r"LoraSettings.layers: item 0: expected an integer >= 0, got -1"),
    ],
)
def test_a12_nonsense_in_adapters_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**fields)  # type: ignore[arg-type]


# --- the seam of replies


def test_requests_and_their_ids_get_the_same_replies() -> None:
    model, batch = chat_model(), text_batch(3)
    from lightning_modules.attacks.base import NoAttack

    decoding = Decoding(max_new_tokens=6)
    asked = [Request(text, system) for text, system in zip(batch.prompts, batch.systems, strict=True)]
    replies = model.reply(asked, decoding)
    assert replies == model.reply(NoAttack()(model, batch), decoding)
    assert replies == model.reply(asked, Decoding(max_new_tokens=6, max_rows=1))
    by_hand = model.generate(model.embed(batch.prompt_ids), batch.prompt_mask, 6, model.chat.stop_ids)
    assert replies == [model.chat.decode(ids) for ids in by_hand]


def test_a_prefill_begins_the_reply_and_is_part_of_it() -> None:
    model = chat_model()
    (plain,) = model.reply([Request("Hello!")], Decoding(max_new_tokens=4))
    (made,) = model.reply([Request("Hello!", prefill="Sure, here is how")], Decoding(max_new_tokens=4))
    assert made.startswith("Sure, here is how")
    assert not plain.startswith("Sure, here is how")
    # The prefill stands where the model's own tokens would: what follows continues it.
    ids = model.chat.prompt("Hello!")
    start = model.chat.reply(ids, "Sure, here is how")[: -len(model.chat.end_of_turn)]
    rows = torch.tensor([ids.ids + start])
    (rest,) = model.generate(
        model.embed(rows), torch.ones_like(rows, dtype=torch.bool), 4, model.chat.stop_ids
    )
    assert made == model.chat.decode(start + rest)


def test_sampled_replies_follow_their_seed_and_leave_the_random_state_alone() -> None:
    model, hot = chat_model(), Decoding(max_new_tokens=8, temperature=2.0)
    state = torch.get_rng_state()
    first, again, other = (model.reply([Request("Hello!")] * 3, hot, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)
    model.module.train()
    model.reply([Request("Hello!")], hot)
    assert model.module.training


def test_a_defence_can_wrap_the_model() -> None:
    """Whatever replies can stand where a model is asked: a defence rewrites requests and asks the model."""

    class Lowered:
        def __init__(self, inside: Replier) -> None:
            self.inside = inside

        def reply(
            self, prompts: Sequence[Request] | Attacked, decoding: Decoding = GREEDY, seed: int = 0
        ) -> list[str]:
            assert isinstance(prompts, Sequence)
            return self.inside.reply([replace(p, text=p.text.lower()) for p in prompts], decoding, seed)

    model = chat_model()
    defended: Replier = Lowered(model)
    assert defended.reply([Request("HELLO!")]) == model.reply([Request("hello!")])


def test_an_endpoint_takes_no_prefill() -> None:
    with pytest.raises(ValueError, match="expected requests without a prefill, got 'Sure'"):
        Endpoint("http://127.0.0.1:9/v1", "m").replies([Request("x", prefill="Sure")])
