"""What a plan says of a training's evaluations, and of devices that share its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from experiments.planning.evaluations import Forward, passes_of
from experiments.planning.shapes_only import ShapesOnly, built_without_weights, without_weights
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt
from lightning_modules.attacks.suffix.adaptive import AdaptiveGCG, Stage
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.text.rewrites import BestOfN, DirectRequest
from tests.conftest import VOCABULARY, tiny_model

Run = Callable[..., tuple[int, str, str]]


def test_devices_share_a_step_of_the_7b_recipe(thundercat: Run) -> None:
    status, out, err = thundercat(
        *("plan", "--config", "configs/experiment/cat_zephyr_7b.yaml", "--devices", "8", "--json"),
        "--model.base.config.num_hidden_layers=1",
    )
    assert status == 0, err
    found = json.loads(out)
    assert "set data.micro_batches: 1 in the run too" in found["warnings"][-1]
    assert found["rows"]["utility"] == 7 and found["rows"]["harmful"] == found["rows"]["attacked"] == 1
    asked = found["evaluations"]
    # At the start and at the end: 40 harmful rows, and 20 under each of three attacks, two of which descend.
    assert asked["replies"] >= 2 * (40 + 20 * 3) and asked["flops"] > 0
    assert asked["passes"] == 2 * 20 * (2 * 100 + 2 * 100)


def test_merged_weights_are_told_though_the_peak_has_none(thundercat: Run) -> None:
    status, out, err = thundercat(
        *(
            "plan",
            "--config",
            "configs/experiment/cat_zephyr_7b.yaml",
            "--config",
            "configs/model/fast_7b.yaml",
        ),
        *("--json", "--model.base.config.num_hidden_layers=1"),
    )
    assert status == 0, err
    most = json.loads(out)["memory_at_most"]
    # Two bytes for each of the layer's linear weights.
    assert most["merged weights"] == 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)


def test_a_pass_s_operations_are_those_of_torch_s_counter() -> None:
    model = tiny_model()
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def scores(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # torch's own counter leaves attention on a CPU out.
    formulas = {attention: scores}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        model(input_ids=torch.arange(12)[None], use_cache=False, logits_to_keep=4)
    with built_without_weights():
        hollow = tiny_model()
    mode = ShapesOnly()
    without_weights(hollow, mode)
    forward = Forward(hollow, mode, VOCABULARY, prompt=8, reply=4)
    assert forward.scored() == forward.reply(4) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("attack", "passes"),
    [
        (None, 0),
        (DirectRequest(), 0),
        (EmbeddingPGD(num_steps=7), 14),
        (SoftPrompt(num_steps=3), 6),
        (LatentPGD(layers=[0], num_steps=5, weight_safe=0.0), 10),
        (LatentPGD(layers=[0], num_steps=5, weight_safe=0.5), 20),
        (GCG(num_steps=2, width=30), 64),
        (AdaptiveGCG([Stage(GCG(num_steps=2, width=30), repetitions=3)]), 192),
        (BestOfN(), None),
    ],
)
def test_what_a_search_takes(attack: Any, passes: int | None) -> None:
    assert passes_of(attack) == passes
