"""Files that change, fill up or vanish around a run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from transformers import PreTrainedModel

from datamodules import contents
from datamodules.contents import fingerprints
from datamodules.text.model_files import PACKAGED_ROOT
from tests.support.rows import row, stored
from tests.support.small_run import equal, trained

Run = Callable[..., tuple[int, str, str]]
ROW = {"goal": "How do I steal a car?", "target": "Sure, here is", "safe_reply": "I cannot help."}


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- the content of what a configuration names


def test_a02_a_data_file_that_changed_is_another_run(fit: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ROW | {"goal": f"How do I steal {i} cars?"}) + "\n" for i in range(4)))
    table = {"class_path": "datamodules.sources.tables.HarmfulTable", "init_args": {"path": str(path)}}
    harmful = f"--data.harmful={json.dumps([table])}"
    status, _, err = fit(harmful)
    assert status == 0, err
    assert fit(harmful, "--ckpt_path=last", "--trainer.max_steps=6")[0] == 0
    path.write_text(path.read_text().replace("steal 3", "steal 5"))
    status, _, err = fit(harmful, "--ckpt_path=last", "--trainer.max_steps=7")
    assert status != 0
    assert "data.harmful.0.path.content: " in err
    assert "Traceback" not in err


def test_a02_base_weights_that_changed_are_another_run(fit: Run, thundercat: Run, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(PACKAGED_ROOT / "aligned", folder)
    base = f"--model.base.name_or_path={folder}"
    assert fit(base)[0] == 0
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = min(weights)
    weights[name] = weights[name] + 1
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = str(tmp_path / "small.yaml")
    # The adapters would be put on a model that they were not trained on.
    for command in ("fit", "test"):
        status, _, err = thundercat(
            command, "--config", config, base, "--ckpt_path=last", "--trainer.max_steps=4"
        )
        assert status != 0, command
        assert "model.base.name_or_path.content: " in err


def test_a_large_file_is_known_by_both_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "WHOLE", 50)
    monkeypatch.setattr(contents, "BLOCK", 10)
    path = tmp_path / "large.safetensors"

    def mark(content: bytes) -> str:
        path.write_bytes(content)
        return fingerprints({"f": str(path)})["f.content"]

    content = bytes(range(100))
    marks = [mark(content), mark(b"x" + content[1:]), mark(content[:-1] + b"x"), mark(content + b"x")]
    assert len(set(marks)) == 4
    assert mark(content) == marks[0]


def test_what_names_no_file_has_no_content(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fields = {"a": "HuggingFaceH4/zephyr-7b-beta", "b": 3, "c": None, "d": "x" * 5000, "e": "tinychat:absent"}
    assert fingerprints({**fields, "f": str(tmp_path / "empty"), "g": ["a", 1]}) == {}


def test_what_a_model_s_folder_says_by_is_its_content(tmp_path: Path) -> None:
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    shutil.copytree(PACKAGED_ROOT / "aligned", base)
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    fields = {"base": str(base), "adapters": str(adapters)}
    marks = [fingerprints(fields)]
    for name in ("chat_template.jinja", "tokenizer_config.json", "model.safetensors"):
        with (base / name).open("ab") as stream:
            stream.write(b" ")
        marks.append(fingerprints(fields))
    # The adapters' own files are the same; what they are put on is not.
    assert all(len({mark[f"{field}.content"] for mark in marks}) == 4 for field in fields)
    (base / "README.md").write_text("a note")
    assert fingerprints(fields) == marks[-1]


def test_a_run_whose_rows_are_data_for_another_is_known_by_its_rows(tmp_path: Path) -> None:
    folder = stored(tmp_path / "run", row("a"))
    before = fingerprints({"run": folder})
    assert before != {}
    stored(tmp_path / "run", row("b"))
    assert fingerprints({"run": folder}) != before


def test_a11_the_checkpoint_of_another_run_is_not_tested_among_this_one_s(
    fit: Run, thundercat: Run, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert fit()[0] == 0
    assert fit("--seed_everything=9", f"--trainer.default_root_dir={other}")[0] == 0
    path = f"--ckpt_path={other / 'checkpoints' / 'step_000003.ckpt'}"
    status, _, err = thundercat("test", "--config", str(tmp_path / "small.yaml"), path)
    assert status != 0
    assert f"is no checkpoint of the run in {tmp_path / 'run'} (data.seed: 0 then, 9 now)" in err
    # Its own folder, or one of no run, is right.
    for folder in (other, tmp_path / "new"):
        place = f"--trainer.default_root_dir={folder}"
        status, _, err = thundercat("test", "--config", str(tmp_path / "small.yaml"), path, place)
        assert "is no checkpoint of the run" not in err


# --- the export


@pytest.mark.parametrize("where", ["run", ".", "precious"])
def test_an_export_never_replaces_what_is_no_export(fit: Run, tmp_path: Path, where: str) -> None:
    (tmp_path / "precious" / "photos").mkdir(parents=True)
    export = {
        "class_path": "callbacks.run_folder.export.ExportModel",
        "init_args": {"folder": str(tmp_path / where)},
    }
    status, _, err = fit(f"--trainer.callbacks={json.dumps([export])}")
    assert status == 1
    assert "ExportModel.folder: " in err.splitlines()[-1]
    assert (tmp_path / "precious" / "photos").is_dir()


def test_an_export_follows_a_link_to_a_larger_disk(fit: Run, tmp_path: Path) -> None:
    export = {"class_path": "callbacks.run_folder.export.ExportModel"}
    checkpoints = {"class_path": "callbacks.run_folder.checkpoints.RunCheckpoints"}
    callbacks = f"--trainer.callbacks={json.dumps([export, checkpoints])}"
    assert fit(callbacks)[0] == 0
    model = tmp_path / "run" / "model"
    model.rename(tmp_path / "large")
    model.symlink_to(tmp_path / "large")
    for steps in (5, 6):
        assert fit(callbacks, "--ckpt_path=last", f"--trainer.max_steps={steps}")[0] == 0
        assert model.is_symlink() and (tmp_path / "large" / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in model.parent.glob("model*")) == ["model"]


# --- a resumed run


def test_early_stopping_finds_what_an_evaluation_found_before_the_kill(fit: Run, tmp_path: Path) -> None:
    evaluation = {
        "class_path": "callbacks.evaluations.refusal.RefusalEvaluation",
        "init_args": {"schedule": {"every_n_steps": 2, "at_end": False}, "max_new_tokens": 4},
    }
    stopping = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "eval/harmful/refusal_rate", "patience": 9},
    }
    checkpoints = {"class_path": "callbacks.run_folder.checkpoints.RunCheckpoints"}
    rows = {
        "class_path": "datamodules.sources.tinychat.sources.TinyChatHarmful",
        "init_args": {"split": "validation", "limit": 2},
    }
    more = (
        f"--trainer.callbacks={json.dumps([evaluation, stopping, checkpoints])}",
        f"--data.evaluation={json.dumps({'harmful': [rows]})}",
        "--trainer.limit_train_batches=3",
    )
    assert fit(*more, "--trainer.max_steps=2")[0] == 0
    status, _, err = fit(*more, "--trainer.max_steps=4", "--ckpt_path=last")
    assert status == 0, err


@pytest.mark.parametrize("killed_after", [1, 2, 3, 4])
def test_a_run_that_was_stopped_early_ends_there_wherever_it_was_killed(
    fit: Run, tmp_path: Path, killed_after: int
) -> None:
    """EarlyStopping decides at the epoch's end, here after four steps, of which a checkpoint must know."""
    stopping = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "train/loss", "patience": 1, "min_delta": 100.0, "mode": "max"},
    }
    checkpoints = {
        "class_path": "callbacks.run_folder.checkpoints.RunCheckpoints",
        "init_args": {"keep": 9},
    }
    more = (
        f"--trainer.callbacks={json.dumps([stopping, checkpoints])}",
        "--trainer.limit_train_batches=2",
        "--trainer.max_steps=40",
    )
    assert fit(*more)[0] == 0
    folder = tmp_path / "run" / "checkpoints"
    steps = [f"step_{step:06d}.ckpt" for step in (1, 2, 3, 4)]
    assert sorted(path.name for path in folder.iterdir()) == steps
    whole = trained(tmp_path / "run")
    for name in steps[killed_after:]:
        (folder / name).unlink()
    assert fit(*more, "--ckpt_path=last")[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == steps
    assert equal(trained(tmp_path / "run"), whole)


# --- a full disk


def test_a05_a_full_disk_at_the_export_keeps_the_model_before_it(
    fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = {"class_path": "callbacks.run_folder.export.ExportModel"}
    checkpoints = {"class_path": "callbacks.run_folder.checkpoints.RunCheckpoints"}
    callbacks = f"--trainer.callbacks={json.dumps([export, checkpoints])}"
    assert fit(callbacks)[0] == 0
    model = tmp_path / "run" / "model"
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "save_pretrained", full, raising=False)
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        patch.setattr("peft.PeftModel.save_pretrained", full)
        status, _, err = fit(callbacks, "--ckpt_path=last", "--trainer.max_steps=6")
    assert status == 1
    assert err.splitlines()[-1].startswith(f"thundercat: {model}: cannot write the trained model (OSError: ")
    assert "make room, then run again with --ckpt_path last" in err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert fit(callbacks, "--ckpt_path=last", "--trainer.max_steps=6")[0] == 0
    assert {path.name: path.read_bytes() for path in model.iterdir()} != before
    assert not list(model.parent.glob("model.*"))


def test_a05_a_full_disk_in_the_log_is_one_line_and_the_run_goes_on_afterwards(
    fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_ExperimentWriter, "save", full)
        status, _, err = fit()
    assert status == 1
    last = f"{tmp_path / 'run'}: no space left on the disk; make room, then go on with --ckpt_path last"
    assert err.splitlines()[-1].startswith(f"thundercat: {last}")
    assert "Traceback" not in err
    assert fit("--ckpt_path=last")[0] == 0
