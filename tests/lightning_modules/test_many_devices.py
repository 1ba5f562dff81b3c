"""Two processes train every method as one does, under DDP and FSDP2; where they are about to do different
things they say so instead of waiting for each other."""

from __future__ import annotations

import itertools
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import start_processes

from tests.support.parity import METHODS, STEPS, go_together, trained


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have computed: one pair for all, since each start costs as much as a method."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(go_together, (str(folder), port), nprocs=2, start_method="fork")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return {method: trained(method, folder) for method in METHODS}


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        *itertools.product(METHODS, ["ddp", "fsdp2"]),
        # Another way to let weights be without a gradient.
        ("circuit_breakers", "static_graph"),
    ],
)
def test_two_processes_train_as_one(
    together: Path, alone: dict[str, dict[str, Any]], method: str, strategy: str
) -> None:
    one = alone[method]
    # Far more than the bound below: the check could fail.
    assert max(weight.abs().max().item() for weight in _moved(one)) > 1e-3
    two = [torch.load(together / f"{method}_{strategy}_{rank}.pt", weights_only=True) for rank in range(2)]
    for own in two:
        for a, b in zip(one["logged"], own["logged"], strict=True):
            assert b == pytest.approx(a, abs=1e-5)
        assert own["weights"].keys() == one["weights"].keys()
        for name, weight in one["weights"].items():
            torch.testing.assert_close(own["weights"][name], weight, atol=1e-5, rtol=0)
    for step in range(STEPS):
        passes = [own["passes"][step] for own in two]
        assert sorted(passes[0] + passes[1]) == sorted(one["passes"][step])
    if method == "cat":
        assert any(sum(a) != sum(b) for a, b in zip(two[0]["passes"], two[1]["passes"], strict=True))


def _moved(run: dict[str, Any]) -> list[torch.Tensor]:
    return [weight - run["start"][name] for name, weight in run["weights"].items()]


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        (
            "a further pass",
            "the end of an outer pass that differentiates passes [1]",
            "pass 2 over the layers with gradients",
        ),
        (
            "a pass without gradients",
            "pass 1 over the layers with gradients",
            "pass 1 over the layers without gradients",
        ),
        (
            "a loss without one",
            "the end of an outer pass that differentiates passes [1, 2]",
            "the end of an outer pass that differentiates passes [2]",
        ),
        ("no attack here", "gathering all weights", "an outer pass"),
        ("no rows to attack", "an attack", "a micro-batch without an attack"),
        ("other losses", "losses train/of_0, train/loss", "losses train/of_1, train/loss"),
    ],
)
def test_processes_that_part_say_so(together: Path, case: str, first: str, second: str) -> None:
    said = f"got '{first}' from process 0 and '{second}' from process 1; "
    for rank in range(2):
        told = torch.load(together / f"told_{rank}.pt", weights_only=True)
        assert re.search(re.escape(said) + ".* set trainer.devices: 1", told[case])


def test_weights_that_ddp_would_wait_for_are_named(together: Path) -> None:
    for rank in range(2):
        told = torch.load(together / f"told_{rank}.pt", weights_only=True)["no gradient"]
        assert re.search(
            r"trainer.strategy: expected a gradient .* got none of 4, e.g. model.*layers\.1\..*lora_A.*; set "
            "base.lora.layers .* ddp_find_unused_parameters_true",
            told,
        )


def test_the_health_of_an_attack_is_that_of_all_processes(together: Path) -> None:
    first, second = (torch.load(together / f"health_{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    found = first["no step"]
    assert 0 < found["train/attack/loss_best"] < found["train/attack/loss_start"]
    # What one process would not log for want of a number, two do not log of the other alone.
    assert first["one lost"].keys() == first["both lost"].keys()
    dropped = {f"train/attack/{name}" for name in ("loss_start", "distance", "no_step", "budget_unused")}
    assert found.keys() - first["one lost"].keys() == dropped
