"""The counters of operations and waits on calls whose numbers are known, and the attack's waits: none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer

from callbacks.cost import CostMonitor
from callbacks.health import AttackHealth
from datamodules.batch import AdversarialBatch, TrainingBatch
from experiments.benchmarks import launches as benchmark
from experiments.benchmarks.counters import Launches
from experiments.planning.step import calm, fit
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.losses.toward_away import TowardAwayUtility
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig
from tests.conftest import ragged_batch, tiny_model, utility


def test_operations_views_and_allocations_are_told_apart() -> None:
    x = torch.ones(2, 3)
    with Launches() as launches:
        (x + 1.0).view(6).t()
        torch.empty(2)
    assert launches.by_name == {"t": 1, "add": 1, "view": 1, "empty": 1}
    assert launches.operations == 4
    assert launches.kernels == 1
    assert not launches.syncs


@pytest.mark.parametrize(
    ("call", "kinds"),
    [
        (lambda x, mask: x.sum().item(), {"scalar read": 1}),
        (lambda x, mask: bool(mask.any()), {"scalar read": 1}),
        (lambda x, mask: mask.nonzero(), {"nonzero": 1}),
        (lambda x, mask: x[mask], {"boolean index": 1}),
        (lambda x, mask: x.masked_select(mask), {"nonzero": 1}),
        (lambda x, mask: x.tolist(), {"copy to the host": 1}),
        (lambda x, mask: x.cpu(), {"copy to the host": 1}),
        (lambda x, mask: x.to("cpu"), {"copy to the host": 1}),
        (lambda x, mask: x.to(mask.device), {}),
        (lambda x, mask: x.to(torch.float64), {}),
        (lambda x, mask: x[torch.tensor([0, 1])], {}),
        (lambda x, mask: torch.where(mask, x, 0.0), {}),
    ],
)
def test_what_waits(call: Callable[[torch.Tensor, torch.Tensor], object], kinds: dict[str, int]) -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    with Launches() as launches:
        call(x, mask)
    assert launches.syncs == kinds


def test_a_mask_waits_again_in_the_backward_pass() -> None:
    x, mask = torch.ones(4, requires_grad=True), torch.tensor([True, False, True, True])
    with Launches() as launches:
        torch.zeros(4).masked_scatter(mask, x[mask] * 2.0).sum().backward()
    assert launches.syncs == {"boolean index": 2, "nonzero": 1}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("size", [1, 3], ids=["no padding", "padding"])
def test_an_attack_s_iterations_wait_for_nothing(size: int, merged: bool) -> None:
    model = LanguageModel(benchmark.build_model(2), merge_rounded=merged)
    batch = ragged_batch(size=size)
    benchmark.pgd(1)(model, batch)
    one, many = (benchmark.counted(lambda n: benchmark.pgd(n)(model, batch), n) for n in (1, 6))
    assert one.syncs == many.syncs
    # How long each row is, and where it may be changed.
    assert one.syncs == {"copy to the host": 1}


class _Costs(CostMonitor):
    """Counts as it does, and writes nothing."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.summary()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_optimiser_step_waits_for_nothing(tmp_path: Path, checkpointed: bool) -> None:
    """The attack, both passes and the callbacks, but for the optimiser's own update. With activations
    recomputed, transformers itself looks at the utility rows' mask, twice a pass."""
    tiny_model().config.save_pretrained(tmp_path)
    base = ModelConfig(str(tmp_path), from_scratch=True, gradient_checkpointing=checkpointed)
    whole = with_lengths(ragged_batch(size=4))
    chats = utility()
    chats = replace(chats, num_scored=int((chats.labels[:, 1:] != -100).sum()))
    parts = [whole.select([0, 1]), whole.select([2, 3])]
    batches = [TrainingBatch(parts[0], chats, whole), TrainingBatch(parts[1], chats)]

    def waits(steps: int) -> Counter[str]:
        own = AdversarialFineTuning(base, benchmark.pgd(2), TowardAwayUtility())
        own.attach(object())  # type: ignore[arg-type]
        own.configure_model()
        # Adam asks for its step count, which is on the host.
        plain = torch.optim.SGD(own.parameters(), 0.1)
        own.configure_optimizers = lambda: plain  # type: ignore[method-assign]
        with calm(), Launches() as launches:
            fit(own, batches, {}, steps, _Costs(), AttackHealth())
        return launches.syncs

    # Two further steps: each is an epoch here, whose loader draws a seed on the host.
    assert waits(3) - waits(1) == {"scalar read": 2 + (8 if checkpointed else 0)}


def with_lengths(batch: AdversarialBatch) -> AdversarialBatch:
    return replace(batch, lengths=batch.counted()).validate()


def test_an_attack_that_is_told_the_lengths_waits_for_nothing_at_all() -> None:
    model = LanguageModel(benchmark.build_model(1))
    batch = with_lengths(ragged_batch(size=3))
    benchmark.pgd(1)(model, batch)
    launches = benchmark.counted(lambda n: benchmark.pgd(n)(model, batch), 2)
    assert launches.syncs == {}
    plain = benchmark.pgd(2)(model, ragged_batch(size=3)).delta
    assert torch.equal(benchmark.pgd(2)(model, batch).delta, plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight_safe", [0.0, 0.5])
def test_a_latent_attack_s_iterations_wait_for_nothing(weight_safe: float) -> None:
    model, batch = LanguageModel(benchmark.build_model(2)), with_lengths(ragged_batch(size=3))

    def attack(steps: int) -> LatentPGD:
        return LatentPGD(layers=[0], num_steps=steps, keep="last", weight_safe=weight_safe)

    attack(1)(model, batch)
    one, many = (benchmark.counted(lambda n: attack(n)(model, batch), n) for n in (1, 6))
    # With one reply transformers itself looks at the rows' mask, twice a pass.
    assert many.syncs - one.syncs == ({} if weight_safe else {"scalar read": 10})


def test_merging_halves_an_iteration_on_pefts_layers_and_short_ones_lie_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def figures() -> dict[str, Any]:
        return benchmark.measure("attack", benchmark.attack_iteration(2), 2, repeats=0)["figures"]

    short = figures()
    monkeypatch.setattr(benchmark, "shorten", lambda model: model)
    pefts = figures()
    assert short["ours, merged"]["kernels"] < 0.65 * pefts["ours"]["kernels"]
    assert short["ours"]["kernels"] < 0.77 * pefts["ours"]["kernels"]
    # Neither merged adapters nor the yardstick know which layers there are.
    assert [short[side] for side in ("ours, merged", "yardstick")] == [
        pefts[side] for side in ("ours, merged", "yardstick")
    ]


def test_an_iteration_waits_for_nothing_and_the_yardstick_for_a_number() -> None:
    figures = benchmark.measure("attack", benchmark.attack_iteration(2), 2, repeats=0)["figures"]
    assert figures["ours"]["syncs"] == {}
    assert figures["yardstick"]["syncs"] == {"scalar read": 1}


def test_the_gcg_step_and_its_yardstick_are_counted() -> None:
    # Times are differences of two calls', of which one may come out below zero on a busy machine: medians.
    figures = benchmark.measure("GCG", benchmark.gcg_step(1), 1, repeats=5)["figures"]
    assert all(side["kernels"] > 0 and side["host_milliseconds"] > 0 for side in figures.values())


def test_a_gcg_step_waits_twice() -> None:
    """What can be typed is seen by the tokenizer, on the host, and the next suffix is chosen there."""
    run = benchmark.gcg_step(2)["ours"]
    run(1)
    one, two = benchmark.counted(run, 1), benchmark.counted(run, 2)
    places = two.places - one.places
    # One for each round of drawing, on the host.
    del places["gcg.GCG._step.<locals>.<lambda>"]
    assert places == {
        # A wait for what the gradient proposes; the other reads a score that is on the host already.
        "gcg.GCG._step": 2,
        # A wait for what was found of the candidates.
        "gcg.GCG._tried": 1,
        # Lists of what is on the host.
        "search.SuffixSearch.gradient": 1,
        "search.SuffixSearch.scores_of_changes": 3,
        "gcg.GCG._step.<locals>.<dictcomp>": 1,
        "search.best_by_owner": 1,
        "ledger.CandidateLedger.record": 1,
    }
    assert two.syncs["nonzero"] == two.syncs["boolean index"] == 0


def test_half_the_rows_a_micro_batch_are_the_same_rows() -> None:
    """Four micro-batches compute one attack, and the losses' operations twice as often."""
    whole, halves, quarters = (
        benchmark.measure_whole("step", {"ours": benchmark.optimiser_step(1, n)["ours"]}, 1, 0)["figures"][
            "ours"
        ]
        for n in (1, 2, 4)
    )
    assert whole["operations"] < halves["operations"] < quarters["operations"] < 2 * halves["operations"]
    assert quarters["operations"] - halves["operations"] > halves["operations"] - whole["operations"]
