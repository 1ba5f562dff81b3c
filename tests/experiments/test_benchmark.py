"""The benchmark's two sides compute the same thing, on rows small enough for a test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from experiments.benchmarks import gcg_nano, half_precision, training_yardstick
from experiments.benchmarks.rows import equal_rows
from experiments.benchmarks.sides import Ours, Public
from experiments.benchmarks.training_step import interleaved, losses_agree, perturbations_agree
from experiments.benchmarks.training_yardstick import embed
from tests.conftest import VOCABULARY, ragged_batch, tiny_model, utility


def sides(family: str = "llama", size: int | None = None) -> tuple[Ours, Public]:
    model = get_peft_model(
        tiny_model(family), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    batches = [utility(), utility()]
    return Ours(model, ragged_batch(), batches), Public(model, ragged_batch(), batches, size)


@pytest.mark.parametrize(("family", "size"), [("llama", None), ("llama_tied", None), ("llama", 2)])
def test_reference_and_ours_agree_on_ragged_rows(family: str, size: int | None) -> None:
    ours, public = sides(family, size)
    mine, theirs = ours.step(), public.step()
    losses_agree(mine.loss, theirs.loss)
    perturbations_agree(ours.adversarial, mine.perturbation, public.by_example(theirs.perturbation))
    assert all(parameter.grad is None for parameter in public.model.parameters())


def test_a_different_perturbation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, public = sides()
    attack = training_yardstick.attack
    monkeypatch.setattr(training_yardstick, "attack", lambda *arguments: 0.5 * attack(*arguments))
    mine, theirs = ours.step(), public.step()
    with pytest.raises(AssertionError, match="find different perturbations"):
        perturbations_agree(ours.adversarial, mine.perturbation, public.by_example(theirs.perturbation))
    with pytest.raises(AssertionError, match="compute different losses"):
        losses_agree(mine.loss, mine.loss + 0.1)


def adapted() -> nn.Module:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(), lora).train()


def test_in_bf16_both_sides_find_what_fp32_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "build_model", lambda vocabulary: adapted())
    monkeypatch.setattr(half_precision, "natural_rows", lambda vocabulary: (ragged_batch(), [utility()]))
    # A model of random weights this small is next to linear: what is gained is small beside bf16's rounding.
    monkeypatch.setattr(half_precision, "LOST", 0.2)
    attack, step = half_precision.measure(VOCABULARY, 1)
    losses = attack["loss_on_fp32"]
    assert losses["fp32"] < losses["unattacked"]
    assert step["loss"]["ours"] == pytest.approx(step["loss"]["reference"], rel=0.02)
    # An attack that finds nothing is no faster attack.
    monkeypatch.setattr(training_yardstick, "attack", lambda model, rows, *_: 0.0 * embed(model, rows.ids))
    with pytest.raises(AssertionError, match="reference: rounding cost the attack"):
        half_precision.measure(VOCABULARY, 1)


def test_the_yardstick_draws_its_micro_batches_and_pads_them_to_their_longest() -> None:
    ours, public = sides(size=2)
    rows, chats = len(ours.adversarial), sum(map(len, ours.utility))
    parts = public.micro_batches
    assert sorted(i for part in parts for i in part.examples) == list(range(rows))
    assert len(parts) == -(-(rows + chats) // 2)
    for part in parts:
        kinds = [kind for kind in (part.harmful, part.safe, part.utility) if kind is not None]
        assert (part.harmful is None) == (part.safe is None) == (not part.examples)
        (length,) = {kind.ids.shape[1] for kind in kinds}
        assert length == max(int(kind.mask.sum(1).max()) for kind in kinds)
        assert all(bool((kind.labels[~kind.mask] == -100).all()) for kind in kinds)
    assert sum(0 if part.utility is None else len(part.utility.ids) for part in parts) == chats


SIDE = """
import json, sys
print(json.dumps({"nanogcg": "0"}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    n = len(job["behaviours"])
    said = {"seconds": 2.0, "candidates": 100 * n, "best_loss": [1.0] * n, "seed": job["seed"]}
    print(json.dumps(said), flush=True)
"""


def test_nanogcg_is_asked_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = tmp_path / "side.py"
    side.write_text(SIDE, encoding="utf-8")
    monkeypatch.setattr(gcg_nano, "SIDE", side)
    row = gcg_nano.measure(Path(sys.executable), "tinychat", width=8, behaviours=2, steps=2, repeats=2)
    assert row["rates"]["nanogcg"] == [100.0, 100.0]
    # 2 steps of 8 candidates for two requests, in seconds.
    assert len(row["rates"]["ours"]) == 2 and min(row["rates"]["ours"]) > 0
    assert row["ratio"] == row["medians"]["ours"] / 100.0
    assert row["versions"] == {"nanogcg": "0"}
    side.write_text("raise SystemExit(3)", encoding="utf-8")
    with pytest.raises(RuntimeError, match="nanoGCG's process ended with status 3; --python must name"):
        gcg_nano.Nano(Path(sys.executable), tmp_path)


def test_equal_rows_have_no_padding() -> None:
    batch, conversations = equal_rows(VOCABULARY, prompt=30, reply=4)
    assert batch.validate().prompt_mask.all()
    assert conversations[0].attention_mask.all()


def test_calls_are_interleaved() -> None:
    order: list[str] = []
    seconds, results = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b") or 3}, 2)
    assert order == ["a", "b", "a", "b"]
    assert results == {"a": None, "b": 3}
    assert [len(values) for values in seconds.values()] == [2, 2]
