"""What the audit found about run folders, checkpoints, seeds and processes, each by its number."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from callbacks.run_folder.checkpoint_files import (
    DamagedCheckpoint,
    RunCheckpointIO,
    load_weights,
    read_checkpoint,
)
from callbacks.run_folder.checkpoints import RunCheckpoints, find_checkpoint
from callbacks.run_folder.folder import RunError
from callbacks.run_folder.lock import RunLock, process_start
from lightning_modules.models.loading import LoraSettings, ModelConfig
from lightning_modules.pretrained import PretrainedModel
from tests.support.small_run import equal, small_config, trained

Run = Callable[..., tuple[int, str, str]]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# A1


def test_a01_a_used_folder_is_refused_and_a_refused_configuration_leaves_it_untouched(
    fit: Run, tmp_path: Path
) -> None:
    assert fit("--trainer.max_steps=1")[0] == 0
    before = content(tmp_path / "run")
    status, _, error = fit("--trainer.max_steps=1")
    assert status == 1
    assert len(error.strip().splitlines()) == 1
    assert all(
        word in error
        for word in ("holds a run", "--ckpt_path last", "--trainer.default_root_dir", "--overwrite")
    )
    assert fit("--overwrite", "--model.attack.num_steps=-3")[0] == 2
    assert content(tmp_path / "run") == before
    assert not (tmp_path / "run.1").exists()


def test_a01_overwrite_moves_the_old_run_aside(fit: Run, tmp_path: Path) -> None:
    assert fit("--trainer.max_steps=1", "--overwrite")[0] == 0
    before = content(tmp_path / "run")
    for number in (1, 2):
        assert fit("--trainer.max_steps=1", "--overwrite")[0] == 0
        assert (tmp_path / f"run.{number}" / "config.yaml").is_file()
    assert content(tmp_path / "run.1") == before
    assert not list(tmp_path.rglob("lock.json"))


# A2


def test_a02_another_configuration_is_not_continued(fit: Run, tmp_path: Path) -> None:
    assert fit("--trainer.max_steps=1")[0] == 0
    before = content(tmp_path / "run")
    status, _, error = fit("--ckpt_path=last", "--model.optimizer.lr=0.02", "--seed_everything=3")
    assert status == 1
    assert "model.optimizer.lr: 0.001 then, 0.02 now" in error
    assert "seed_everything: 0 then, 3 now" in error
    assert content(tmp_path / "run") == before


def test_a02_defaults_written_out_are_no_difference_and_steps_may_differ(
    fit: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit("--trainer.max_steps=1")[0] == 0
    assert fit("--ckpt_path=last", "--trainer.max_steps=2", "--model.optimizer.weight_decay=0.0")[0] == 0
    assert "trainer.max_steps: 1 then, 2 now: the learning rate goes on by the schedule over" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "step_000002.ckpt").is_file()


def test_a02_a_run_begun_without_a_command_line_does_not_write_among_another_s_checkpoints(
    fit: Run, tmp_path: Path
) -> None:
    assert fit("--trainer.max_steps=1")[0] == 0
    checkpoints = RunCheckpoints()
    trainer = Trainer(
        default_root_dir=tmp_path / "run", logger=False, callbacks=[checkpoints], accelerator="cpu"
    )
    with pytest.raises(RunError, match="holds a run"):
        checkpoints.on_fit_start(trainer, PretrainedModel(ModelConfig("tinychat:aligned")))


# A3


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a03_no_checkpoint_is_an_error_where_one_is_asked_for(
    thundercat: Run, tmp_path: Path, command: str
) -> None:
    status, _, error = thundercat(command, "--config", str(small_config(tmp_path)), "--ckpt_path=last")
    assert status == 1
    assert f"no checkpoint in {tmp_path / 'run' / 'checkpoints'}" in error
    assert not (tmp_path / "run" / "test_config.yaml").exists()


def test_a03_fit_starts_where_a_kill_came_before_the_first_checkpoint_and_says_so(
    fit: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit("--ckpt_path=last", "--trainer.max_steps=1")[0] == 0
    assert "no checkpoint in" in caplog.text
    assert "training starts at step 0" in caplog.text


# A4


def test_a04_weights_that_do_not_fit_are_refused(fit: Run, tmp_path: Path) -> None:
    assert fit("--trainer.max_steps=1")[0] == 0
    path = tmp_path / "run" / "checkpoints" / "step_000001.ckpt"
    fitting = PretrainedModel(ModelConfig("tinychat:aligned", lora=LoraSettings(r=2)))
    fitting.configure_model()
    assert load_weights(fitting, path) == 1
    assert equal(
        {k: v for k, v in fitting.state_dict().items() if k in trained(tmp_path / "run")},
        trained(tmp_path / "run"),
    )
    for lora, message in ((None, "unknown"), (LoraSettings(r=3), "of another shape")):
        other = PretrainedModel(ModelConfig("tinychat:aligned", lora=lora))
        other.configure_model()
        with pytest.raises(ValueError, match=message):
            load_weights(other, path)


# A5


def written(folder: Path, steps: tuple[int, ...] = (1, 2)) -> list[Path]:
    """Checkpoints of a run folder, oldest first."""
    writer = RunCheckpointIO()
    paths = [folder / "checkpoints" / f"step_{step:06d}.ckpt" for step in steps]
    for step, path in zip(steps, paths, strict=True):
        writer.save_checkpoint(
            {"global_step": step, "state_dict": {"w": torch.full((999,), float(step))}}, path
        )
    return paths


def flipped(data: bytes) -> bytes:
    place = data.index(b"\x00\x00\x00\x40" * 8) + 5
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


class Payload:
    """Creates a file when it is unpickled."""

    ran = "payload_ran"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.ran,)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: os.urandom(999),
        flipped,
        lambda data: pickle.dumps(Payload()),
        lambda data: pickle.dumps([1]),
    ],
    ids=["truncated", "empty", "junk", "flipped bit", "pickle", "other pickle"],
)
def test_a05_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = written(tmp_path)
    config = {"trainer": {}, "model": None, "data": None}
    assert find_checkpoint(tmp_path, None, "test", config) is None
    assert "no ckpt_path: this is the model before training; --ckpt_path last" in caplog.text
    assert find_checkpoint(tmp_path, "last", "test", config) == second
    second.write_bytes(damage(second.read_bytes()))
    assert find_checkpoint(tmp_path, "last", "test", config) == first
    assert "step_000002.ckpt: damaged" in caplog.text
    assert not Path(Payload.ran).exists()
    with pytest.raises(DamagedCheckpoint, match="damaged"):
        find_checkpoint(tmp_path, str(second), "test", config)
    first.write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="none before it is left"):
        find_checkpoint(tmp_path, "last", "fit", config)


def test_a05_a_full_disk_keeps_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = written(tmp_path)

    def full(content: object, stream: io.BufferedWriter) -> None:
        stream.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        RunError, match=r"step_000001.ckpt: cannot write .*\(No space left on device\).*make room"
    ):
        written(tmp_path, (1,))
    assert read_checkpoint(first)["global_step"] == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_a05_a_checkpoint_is_never_elsewhere_and_never_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    seen: list[list[str]] = []
    save = torch.save

    def watched(content: object, stream: Any) -> None:
        save(content, stream)
        seen.append(sorted(path.name for path in tmp_path.rglob("*.*")))

    monkeypatch.setattr(torch, "save", watched)
    written(tmp_path)
    assert seen[1] == ["step_000001.ckpt", "step_000002.ckpt.partial"]


def test_a05_lightning_s_own_callback_writes_the_same_way(fit: Run, tmp_path: Path) -> None:
    own = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    own["init_args"] = {"dirpath": str(tmp_path / "run" / "checkpoints"), "monitor": "train/loss",
                        "save_last": True, "every_n_train_steps": 1}  # type: ignore[assignment]  # fmt: skip
    assert fit("--trainer.max_steps=2", f"--trainer.callbacks={json.dumps([own])}")[0] == 0
    paths = list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert len(paths) == 2
    assert all(
        read_checkpoint(path)["decisive_configuration"]["model.optimizer.lr"] == 1e-3 for path in paths
    )
    assert (
        fit("--trainer.max_steps=3", f"--trainer.callbacks={json.dumps([own])}", "--ckpt_path=last")[0] == 0
    )


# A14


def test_a14_a_second_process_in_the_folder_is_refused(tmp_path: Path) -> None:
    holds = (
        "import sys, time",
        "from callbacks.run_folder.lock import RunLock",
        "with RunLock(sys.argv[1]):",
        "    print(1, flush=True)",
        "    time.sleep(99)",
    )
    words = [sys.executable, "-c", "\n".join(holds), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        with pytest.raises(RunError, match=f"in use by process {other.pid} on this"), RunLock(tmp_path):
            pass
        other.kill()
    # Its owner is dead, so the lock is there to be taken.
    assert (tmp_path / "lock.json").is_file()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock.json").exists()


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        ({"host": socket.gethostname(), "pid": os.getpid(), "started": "another boot/1"}, None),
        (
            {"host": socket.gethostname(), "pid": os.getpid(), "started": process_start(os.getpid())},
            "this machine",
        ),
        (
            {"host": "elsewhere", "pid": 1, "started": "x"},
            "in use by process 1 on elsewhere; .*remove .*lock.json",
        ),
        ("torn {", None),
    ],
    ids=["reused number", "this process", "other host", "torn"],
)
def test_a14_who_owns_a_lock(tmp_path: Path, owner: Any, message: str | None) -> None:
    (tmp_path / "lock.json").write_text(owner if isinstance(owner, str) else json.dumps(owner))
    if message is None:
        with RunLock(tmp_path):
            pass
    else:
        with pytest.raises(RunError, match=message), RunLock(tmp_path):
            pass
