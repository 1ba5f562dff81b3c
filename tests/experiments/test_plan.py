"""A planned training step against the same step on real tensors: memory by torch's profiler, operations by
torch's counter."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM

from datamodules.batch import TrainingBatch
from datamodules.division import Division
from experiments.benchmarks.cards import DEPTHS, Choice, choose, deeper
from experiments.commands.plan import Executed, communication, in_bytes, largest_rows
from experiments.config.errors import ConfigError
from experiments.planning.four_bits import as_nf4, nf4_bytes
from experiments.planning.memory import (
    ACTIVATIONS,
    ADAPTERS,
    ATTACK,
    GRADIENTS,
    MERGED,
    OPTIMISER,
    WEIGHTS,
)
from experiments.planning.rows import full_rows
from experiments.planning.shapes_only import ShapesOnly, UnknownValue, built_without_weights, without_weights
from experiments.planning.step import StepCost, calm, count_step, fit
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.losses.preference import Preference
from lightning_modules.losses.toward_away import TowardAwayUtility
from lightning_modules.models.loading import LoraSettings, ModelConfig
from lightning_modules.models.low_rank import LowRankLinear
from tests.conftest import VOCABULARY, ragged_batch, utility

Run = Callable[..., tuple[int, str, str]]
SHAPES: dict[str, dict[str, Any]] = {
    "all weights, fp32, wide": {"base": {"dtype": "float32"}, "trainer": {}, "rows": (6, 12), "layers": 2},
    "adapters on bf16, mixed": {
        "base": {"dtype": "bfloat16", "lora": LoraSettings(r=8)},
        "trainer": {"precision": "bf16-mixed", "gradient_clip_val": 0.3},
        "rows": (2, 6),
        "layers": 2,
        "objective": Preference(weight_utility=1.0),  # compared with scores that a plan has not
    },
    "adapters on fp32, merged, recomputed": {
        "base": {"dtype": "float32", "lora": LoraSettings(r=8), "gradient_checkpointing": True},
        "trainer": {"gradient_clip_val": 0.3},
        "rows": (3, 4),
        "layers": 3,
    },
}


def folder_of(path: Path, layers: int) -> str:
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    ).save_pretrained(path)  # fmt: skip
    return str(path)


def module(folder: str, shape: dict[str, Any], **attack: Any) -> AdversarialFineTuning:
    settings = {"epsilon": 0.1, "num_steps": 5, "step_size": 0.3, "keep": "last"} | attack
    return AdversarialFineTuning(
        ModelConfig(folder, **{"from_scratch": True} | shape["base"]),
        EmbeddingPGD(**settings),
        shape.get("objective", TowardAwayUtility()),
        seed=0,
    )


def planned(
    shape: dict[str, Any], folder: str, batches: list[TrainingBatch], steps: int = 2, attack_steps: int = 3
) -> Any:
    own = module(folder, shape, num_steps=attack_steps)
    own.attach(object())  # type: ignore[arg-type]
    with built_without_weights():
        own.configure_model()
    return count_step(own, batches, shape["trainer"], steps, ShapesOnly())


def measured(shape: dict[str, Any], folder: str, batches: list[TrainingBatch], steps: int = 2) -> int:
    """Peak of what the CPU allocator had handed out, weights included, by torch's profiler."""
    own = module(folder, shape, num_steps=3)
    own.attach(object())  # type: ignore[arg-type]
    own.configure_model()
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own.model.state_dict().values()
    }
    # What earlier tests have left would be freed meanwhile, and counted as memory that the step gives back.
    gc.collect()
    with calm(), profile(profile_memory=True) as profiler:
        fit(own, batches, shape["trainer"], steps)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak + sum(held.values())


@pytest.mark.parametrize("name", SHAPES)
def test_the_peak_is_the_allocator_s(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    folder = folder_of(tmp_path, shape["layers"])
    harmful, chats = shape["rows"]
    ragged = TrainingBatch(
        ragged_batch(size=harmful, prompt=30, harmful=20, safe=24), utility(size=chats, length=60)
    )
    full = full_rows({"harmful": harmful, "utility": chats}, 40, 20, VOCABULARY)
    batches = [ragged, full]
    plan = planned(shape, folder, batches)
    assert plan.peak == pytest.approx(measured(shape, folder, batches), rel=0.1)


@pytest.mark.parametrize("name", SHAPES)
def test_operations_are_those_of_torch_s_counter(name: str, tmp_path: Path) -> None:
    """The attack's iterations that a plan leaves out are counted all the same."""
    shape = SHAPES[name]
    folder = folder_of(tmp_path, shape["layers"])
    batch = TrainingBatch(ragged_batch(size=3, prompt=30), utility(size=4))
    plan = planned(shape, folder, [batch], steps=1, attack_steps=5)
    own = module(folder, shape)
    own.attach(object())  # type: ignore[arg-type]
    own.configure_model()
    # torch's counter leaves out attention on a CPU, which a GPU's kernels would count.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda up, q, k, v, *_, **__: (
            sdpa_backward_flop_count(up, q, k, v)
        ),
    }
    with calm(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        fit(own, [batch], shape["trainer"], 1)
    assert plan.flops[ATTACK] > 0
    assert plan.flops.total() == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_passes_over_the_layers(tmp_path: Path) -> None:
    """Five iterations there and back, both replies in one pass, the utility rows in another."""
    batch = TrainingBatch(ragged_batch(size=3), utility(size=4))
    folder = folder_of(tmp_path, 2)
    plan = planned(SHAPES["adapters on bf16, mixed"], folder, [batch], 1, attack_steps=5)
    assert plan.sweeps == {ATTACK: 10, ACTIVATIONS: 4}
    weights, gradients = plan.persistent[WEIGHTS] + plan.persistent[ADAPTERS], plan.persistent[GRADIENTS]
    assert communication(plan, 4) == {
        "ddp": 2 * gradients * 3 // 4,
        "fsdp2": (5 * weights + gradients) * 3 // 4,
        "gathered_each_pass": (14 * weights + gradients) * 3 // 4,
        "gathered_once_a_step": (weights + gradients) * 3 // 4,
    }


def test_a_step_grows_by_as_much_with_each_layer(tmp_path: Path) -> None:
    shape = SHAPES["adapters on bf16, mixed"]
    batch = full_rows({"harmful": 2, "utility": 4}, 40, 20, VOCABULARY)
    # The depths that cards.py plans: with two layers the peak lies elsewhere than in a deep model.
    first, second = DEPTHS
    shallow, deep, deeper_still = (
        planned(shape, folder_of(tmp_path / str(n), n), [batch]) for n in (first, second, 9)
    )
    assert deeper(shallow, deep, (9 - first) / (second - first)) == deeper_still


def test_a_base_in_four_bits(tmp_path: Path) -> None:
    """128 x 64 weights: 4,096 bytes of two each, 128 blocks' scales, one block of those."""
    assert nf4_bytes(128 * 64) == 4096 + 128 + 4
    shape = SHAPES["adapters on bf16, mixed"]
    own = module(folder_of(tmp_path, 2), shape, num_steps=3)
    own.attach(object())  # type: ignore[arg-type]
    with built_without_weights():
        own.configure_model()
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert as_nf4(own.model) == 2 * linear - 2 * (2 * nf4_bytes(64 * 64) + 2 * nf4_bytes(64 * 32)) - 6 * (
        nf4_bytes(64 * 160)
    )
    assert not any(isinstance(part, LowRankLinear) for part in own.model.modules())
    dtypes = {name: p.dtype for name, p in own.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "base_layer" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "base_layer" not in name} == {torch.float32}
    batch = full_rows({"harmful": 2, "utility": 2}, 40, 20, VOCABULARY)
    four = count_step(own, [batch], shape["trainer"], 2, ShapesOnly())
    bf16 = planned(shape, str(tmp_path), [batch])
    assert four.flops == bf16.flops
    # What a backward pass keeps is twice as wide but for the adapters' inputs.
    assert 1.2 < four.peaks[ATTACK][ATTACK] / bf16.peaks[ATTACK][ATTACK] < 2.0


def test_a_peak_in_four_bits_is_the_allocator_s(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the base is in 4 bits")
    torch.manual_seed(0)
    size = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**size, **heads)).to(torch.bfloat16).save_pretrained(tmp_path)
    base = {"dtype": "bfloat16", "lora": LoraSettings(r=8), "gradient_checkpointing": True}
    trainer = {"precision": "bf16-mixed", "gradient_clip_val": 0.3}
    batches = [full_rows({"harmful": 2, "utility": 2}, 20, 20, 512)]
    own = module(str(tmp_path), {"base": base}, num_steps=3)
    own.attach(object())  # type: ignore[arg-type]
    with built_without_weights():
        own.configure_model()
    saved = as_nf4(own.model)
    plan = count_step(own, batches, trainer, 2, ShapesOnly())
    real = {"base": {**base, "quantization": "nf4", "from_scratch": False}, "trainer": trainer}
    assert plan.peak - saved == pytest.approx(measured(real, str(tmp_path), batches), rel=0.05)


@pytest.mark.parametrize(
    ("memory", "rate", "wanted"),
    [
        (1000, 1e-12, Choice("wide", 8, 8, 900, 1000 / 1080)),
        (700, 1e-12, Choice("narrow", 8, 8, 600, 2000 / 1080)),
        (350, 1e-12, Choice("narrow", 2, 8, 300, 2000 / 1080)),
        (199, 1e-12, None),
    ],
)
def test_a_card_takes_the_first_settings_that_fit(memory: int, rate: float, wanted: Choice | None) -> None:
    def done(attack: int, flops: int) -> Executed:
        peaks = {ATTACK: Counter({WEIGHTS: 200, ATTACK: attack}), ACTIVATIONS: Counter({WEIGHTS: 300})}
        persistent, counts = Counter({WEIGHTS: 200}), Counter({ATTACK: flops})
        cost = StepCost(peaks, persistent=persistent, flops=counts)
        return Executed(cost, {"attacked": 8}, 8, None, False)

    plans = {"wide": done(700, 1), "narrow": done(400, 2)}
    found = choose(plans, Division(8, 56, 8), 1000, memory, rate)
    assert found == (wanted and wanted._replace(hours=pytest.approx(wanted.hours)))


def test_parts_are_told_apart(tmp_path: Path) -> None:
    shape = SHAPES["adapters on fp32, merged, recomputed"]
    batch = TrainingBatch(ragged_batch(), utility())
    plan = planned(shape, folder_of(tmp_path, 2), [batch])
    learning = 4 * plan.trained
    persistent = plan.persistent
    assert persistent[ADAPTERS] == persistent[GRADIENTS] == learning
    # Two moments, and a step count of four bytes for each of the tensors.
    assert 2 * learning <= persistent[OPTIMISER] <= 2 * learning + 4 * 2 * 7 * 2
    assert persistent[WEIGHTS] >= 4 * (plan.parameters - plan.trained)
    assert persistent[MERGED] == 0
    assert plan.at_peak[MERGED] > 0


def test_what_decides_by_a_value_cannot_be_planned() -> None:
    with ShapesOnly(), pytest.raises(UnknownValue, match="floating-point value"):
        torch.zeros(3).sum().item()


def test_masks_and_ids_are_computed() -> None:
    with ShapesOnly():
        mask = torch.tensor([[True, False], [True, True]])
        assert torch.zeros(2, 2, 5)[mask].shape == (3, 5)
        assert mask.sum().item() == 3


def test_tied_weights_stay_tied() -> None:
    with built_without_weights():
        pair = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    pair[1].weight = pair[0].weight
    without_weights(pair, ShapesOnly())
    assert pair[0].weight is pair[1].weight
    assert pair[0].bias is not pair[1].bias


def test_a_plan_of_the_packaged_model(thundercat: Run) -> None:
    status, out, err = thundercat(
        *("plan", "--config", "configs/quickstart.yaml", "--json", "--device-memory", "1MiB"),
        *("--data.harmful_per_step=4", "--data.utility_per_step=4", "--data.micro_batches=2"),
        *("--trainer.max_steps=10", "--trainer.precision=32-true", "--model.terms=[]"),
        *(f"--model.attack.attacks.{i}.num_steps=2" for i in (0, 1)),
    )
    assert status == 0, err
    found = json.loads(out)
    assert found["parameters"]["all"] == found["parameters"]["trained"] == 1_236_352
    assert found["peak"] == sum(found["memory"].values())
    assert found["steps"] == found["checkpoints"] == 10
    assert "does not fit" in found["warnings"][0]
    assert found["largest_rows"] == 0


@pytest.mark.parametrize("name", SHAPES)
def test_the_rows_that_are_said_to_fit_do(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    folder = folder_of(tmp_path, shape["layers"])

    def peak(rows: int) -> Any:
        batch = full_rows({"harmful": rows, "utility": rows}, 40, 20, VOCABULARY)
        return planned(shape, folder, [batch])

    few, memory = peak(2), 30_000_000
    rows = min(largest_rows(few, memory, 4, attack) for attack in (False, True)) // 2
    assert rows > 2
    assert 0.8 * memory < peak(rows).peak <= memory


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices=3"], "data.harmful_per_step: expected a multiple of micro_batches x devices = 1 x 3"),
        (["--devices=0"], "--devices: expected a number above 0, got 0"),
        (["--prompt-tokens=500"], "expected two lengths of together at most data.encoding.max_length"),
        (["--device-memory=much"], "--device-memory: expected a size like 80GiB or 40GB, got 'much'"),
    ],
)
def test_what_cannot_be_planned_is_said(words: list[str], message: str, thundercat: Run) -> None:
    status, _, err = thundercat("plan", "--config", "configs/experiment/cat_tinychat.yaml", *words)
    assert status == 2
    assert message in err


def test_an_unknown_model_is_named(thundercat: Run) -> None:
    status, _, err = thundercat(
        *("plan", "--config", "configs/experiment/cat_zephyr_7b.yaml", "--model.base.name_or_path=some/model")
    )
    assert status == 2
    assert "model.base.name_or_path: the configuration of 'some/model' is not at hand; put its" in err


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("1.5 GB", 1_500_000_000), ("7 B", 7)])
def test_sizes(text: str, size: int) -> None:
    assert in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12 apples", "-1GiB", "1.2.3GiB", "0", "80"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--device-memory: expected a size like"):
        in_bytes(text)
