"""The GPU benchmark at a test's width, on a CPU; where there is no card it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import gpu
from experiments.benchmarks.gpu_sides import Call


def test_every_figure_at_toy_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--shape",
        "toy",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--compile",
        "none",
        "--out",
        str(tmp_path),
    ]
    assert gpu.main(words) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows = {(row["what"], row["side"]): row for row in report["rows"] if row["what"].endswith("bf16")}
    assert {what for what, _ in rows} == {"attack, bf16", "step, bf16", "gcg, bf16"}
    for what in ("attack, bf16", "step, bf16", "gcg, bf16"):
        own, merged, yardstick = (rows[what, side] for side in ("ours", "ours, merged", "yardstick"))
        assert merged["kernels"] < own["kernels"]
        assert merged["flops"] < own["flops"] < yardstick["flops"]
        for row in (own, merged, yardstick):
            expected = row["flops"] / row["seconds"] / report["rate"]
            assert row["share_of_matrix_rate"] == pytest.approx(expected)
            assert row["per_second"] * row["seconds"] in (pytest.approx(16), pytest.approx(n_tokens(what)))
    told = capsys.readouterr().out
    assert told == (tmp_path / "gpu.md").read_text() + "\n"
    assert f"| {rows['step, bf16', 'ours']['kernels']:,} |" in told


def n_tokens(what: str) -> int:
    """Ten iterations of 8 rows of 24 + 8 tokens; a step of 8 rows with two replies and 56 with one."""
    return 10 * 8 * 32 if what.startswith("attack") else 8 * 40 + 56 * 32


def test_a_side_that_fails_is_reported_and_the_others_go_on() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    calls = {"one": Call(fails, 1, "tokens"), "other": Call(lambda: torch.ones(2) + 1, 4, "tokens")}
    failed, done = gpu.measure("attack", calls, 2, torch.device("cpu"), 1e9)
    assert failed == {
        "what": "attack", "side": "one", "failed": "CUDA out of memory. Tried to allocate 2 GiB",
    }  # fmt: skip
    assert done["kernels"] == 2
    assert len(done["all_seconds"]) == 2
    assert "failed: CUDA out of memory" in gpu.table([failed, done], 1e9)


def test_a_compiled_side_s_kernels_are_not_told() -> None:
    def run() -> torch.Tensor:
        return torch.ones(2, 2) @ torch.ones(2, 2)

    calls = {"ours": Call(run, 1, "tokens"), "compiled": Call(run, 1, "tokens", like="ours")}
    own, other = gpu.measure("attack", calls, 1, torch.device("cpu"), 1e9)
    assert own["flops"] == other["flops"] == 2 * 2**3
    assert other["kernels"] is other["waits"] is None


def test_without_a_card_it_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--device cuda: expected a CUDA GPU, found none; run it where there is one, or" in told


def test_a_model_or_a_figure_that_does_not_fit_costs_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured before is on disk; what fails before it is a row."""

    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu, "matrix_rate", lambda device: 1e9)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    calls = {"ours": Call(lambda: torch.ones(2) + 1, 4, "tokens")}
    monkeypatch.setattr(gpu, "build", lambda *_, **__: object())
    monkeypatch.setattr(gpu, "attacks", lambda *_: calls)
    monkeypatch.setattr(gpu, "training_steps", fails)
    monkeypatch.setattr(gpu, "gcg_steps", lambda *_: calls)
    words = ["--shape", "toy", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]
    assert gpu.main(words) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["what"], row.get("failed")) for row in rows] == [
        ("attack, bf16", None),
        ("step, bf16", "CUDA out of memory."),
        ("gcg, bf16", None),
    ]
    monkeypatch.setattr(gpu, "build", fails)
    assert gpu.main(words) == 0
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert row == {"what": "bf16", "side": "the model", "failed": "CUDA out of memory."}


@pytest.mark.parametrize("words", [["--repeats", "0"], ["--only", "nosuch"]])
def test_nothing_to_measure_is_an_error(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--shape", "toy", "--device", "cpu", *words])
