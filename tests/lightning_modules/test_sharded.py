"""FSDP2: two processes, each with a piece of every weight, train, evaluate, save and export what one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from callbacks.report.training_log import read_training_log
from callbacks.run_folder.checkpoint_files import (
    DamagedCheckpoint,
    RunCheckpointIO,
    read_checkpoint,
    remove,
    remove_unnamed,
)
from callbacks.run_folder.checkpoint_pieces import PIECES, pieces_beside
from datamodules.result_lines import Row
from datamodules.results import read_rows
from lightning_modules.models.loading import LoraSettings, ModelConfig
from lightning_modules.pretrained import check_strategy
from lightning_modules.sharded import FSDP2, check_sharding
from tests.conftest import ROOT
from tests.support.forked import in_two_processes
from tests.support.small_run import evaluated, small_config

Run = Callable[..., tuple[int, str, str]]
FSDP = ("--config", "configs/trainer/fsdp2.yaml")
SAME = (
    "--model.attack.random_start=false",
    "--model.base.lora.dropout=0.0",
    "--data.harmful_per_step=4",
    "--trainer.callbacks.1.keep=9",
)


class Conditioned(torch.optim.AdamW):
    """Adam divides a gradient by its own size, so that one which is nothing but rounding (2e-10 beside 8e-6)
    moves its weight by a share of the learning rate, another one on another processor. At this eps it does
    not."""

    def __init__(self, *arguments: Any, **how: Any) -> None:
        super().__init__(*arguments, **how, eps=1e-6)


@pytest.fixture(autouse=True)
def conditioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forked processes have it too."""
    monkeypatch.setattr(torch.optim, "AdamW", Conditioned)


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:06d}.ckpt"


def said(row: Row) -> tuple[str, ...]:
    return str(row.step), row.attack, row.example, str(row.attacked), row.reply, json.dumps(row.verdicts)


def assert_close(alone: Path, together: Path, step: int) -> None:
    """The gradients of all steps so far, as Adam's moments, and the weights."""
    one, two = (read_checkpoint(checkpoint(folder, step)) for folder in (alone, together))
    assert one.keys() == two.keys()
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, atol=1e-5, rtol=0)
    (own,), (other,) = one["optimizer_states"], two["optimizer_states"]
    assert own["param_groups"] == other["param_groups"]
    assert own["state"].keys() == other["state"].keys()
    for number, moments in own["state"].items():
        for name, value in moments.items():
            # In units of the tensor's own size: fresh adapters' gradients are small.
            bound = 1e-4 * value.abs().max().item()
            torch.testing.assert_close(other["state"][number][name], value, atol=bound, rtol=0)
    for a, b in zip(read_training_log(alone), read_training_log(together), strict=True):
        for name in ("train/loss", "train/loss_away", "train/loss_toward", "train/loss_utility"):
            assert float(b[name]) == pytest.approx(float(a[name]), abs=1e-6), name


def test_adapters_train_evaluate_export_and_resume_as_in_one_process(thundercat: Run, tmp_path: Path) -> None:
    suite = yaml.safe_load((ROOT / "tests" / "configs" / "limited_suite.yaml").read_text())
    suite["trainer"]["callbacks"][0]["init_args"]["schedule"] |= {"at_start": True, "limit": 5}
    callbacks = [
        {"class_path": "callbacks.cost.CostMonitor"},
        {"class_path": "callbacks.run_folder.checkpoints.RunCheckpoints", "init_args": {"keep": 9}},
        {"class_path": "callbacks.run_folder.export.ExportModel"},
        suite["trainer"]["callbacks"][0],
    ]
    words = ["fit", "--config", str(small_config(tmp_path)), evaluated(5), *SAME[:-1]]
    words += [f"--trainer.callbacks={json.dumps(callbacks)}", "--trainer.max_steps=2"]
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    assert thundercat(*words, f"--trainer.default_root_dir={one}")[0] == 0
    in_two_processes([*words, f"--trainer.default_root_dir={two}"], tmp_path, *FSDP)

    assert_close(one, two, 2)
    (folder,) = pieces_beside(checkpoint(two, 2))
    pieces = sorted(folder.iterdir())
    assert [file.suffix for file in pieces] == [".safetensors"] * 2
    assert min(file.stat().st_size for file in pieces) > max(file.stat().st_size for file in pieces) / 2
    alone, together = ([said(row) for row in read_rows(folder)] for folder in (one, two))
    assert sorted(alone) == sorted(together)
    # Before the first step and after the last, one process a row more than the other; of equal weights the
    # same digest, from pieces too.
    assert len(alone) == 14
    digests = [{row.model for row in read_rows(folder) if row.step == 0} for folder in (one, two)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 1
    exported = [load_file(folder / "model" / "adapter_model.safetensors") for folder in (one, two)]
    assert exported[0].keys() == exported[1].keys()
    for name, weight in exported[0].items():
        torch.testing.assert_close(exported[1][name], weight, atol=1e-5, rtol=0)

    # Fewer processes go on from the pieces, bit for bit what they hold.
    shutil.copytree(two, again)
    remove(checkpoint(again, 2))
    assert not [*pieces_beside(checkpoint(again, 2))]
    words = [*words, f"--trainer.default_root_dir={again}", "--ckpt_path=last"]
    assert thundercat(*words)[0] == 0
    assert_close(again, two, 2)

    # A damaged piece is noticed, and the checkpoint before it is taken.
    content = bytearray(pieces[1].read_bytes())
    content[-1] ^= 1
    pieces[1].write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=f"damaged .*{pieces[1].name} is not what was written"):
        read_checkpoint(checkpoint(two, 2))
    pieces[1].unlink()
    with pytest.raises(DamagedCheckpoint, match=f"damaged .*{pieces[1].name} is missing"):
        read_checkpoint(checkpoint(two, 2))
    assert read_checkpoint(checkpoint(two, 1))["global_step"] == 1


def test_all_weights_accumulated_and_recomputed_resume_on_more_processes(
    thundercat: Run, tmp_path: Path
) -> None:
    words = ["fit", "--config", str(small_config(tmp_path)), *SAME, "--model.base.lora=null"]
    words += ["--trainer.max_steps=2", "--model.base.gradient_checkpointing=true"]
    words += ["--trainer.accumulate_grad_batches=2", "--data.micro_batches=2", "--data.utility_per_step=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert thundercat(*words, f"--trainer.default_root_dir={one}")[0] == 0
    shutil.copytree(one, two)
    remove(checkpoint(two, 2))
    in_two_processes([*words, f"--trainer.default_root_dir={two}", "--ckpt_path=last"], tmp_path, *FSDP)
    assert_close(one, two, 2)


# what a record names


def test_pieces_stay_as_long_as_a_record_names_them(tmp_path: Path) -> None:
    """One that was replaced, set aside or kept, and what a kill left over."""
    path, writer = tmp_path / "step_000020.ckpt", RunCheckpointIO()
    first, second, orphan = (tmp_path / f"step_000020.{name}.pieces" for name in ("1a", "2b", "3c"))
    other = tmp_path / "step_000010.4d.pieces"
    for folder in (first, second, orphan, other):
        folder.mkdir()
    (first / "x").touch()

    def save(folder: Path) -> None:
        writer.save_checkpoint({PIECES: {"folder": folder.name, "files": {}}}, path)
        remove_unnamed(path)

    save(first)
    assert first.exists() and other.exists() and not second.exists() and not orphan.exists()
    path.rename(path.with_suffix(".aside"))
    second.mkdir()
    save(second)
    assert first.exists() and second.exists()
    third = tmp_path / "step_000020.5e.pieces"
    third.mkdir()
    save(third)
    assert first.exists() and third.exists() and not second.exists()
    remove(path)
    assert first.exists() and not third.exists()


# refusals


def test_what_cannot_be_sharded_is_refused_by_name() -> None:
    check_strategy(FSDP2())
    check_sharding(ModelConfig("tinychat:aligned"), "bf16-mixed")
    with pytest.raises(ValueError, match="trainer.precision: expected 32-true or bf16-mixed .* got 16-mixed"):
        check_sharding(ModelConfig("tinychat:aligned"), "16-mixed")
    four_bits = ModelConfig("tinychat:aligned", lora=LoraSettings())
    four_bits.quantization = "nf4"
    with pytest.raises(ValueError, match="base.quantization: nf4 .* set trainer.strategy: ddp"):
        check_sharding(four_bits, "32-true")
