"""W&B without network, key or a working server never stops a run, and hyperparameters reach every logger."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.run_folder.loggers import LogConfiguration, ResilientWandbLogger, RunCSVLogger, flat
from tests.conftest import ROOT

KEY = "a" * 40


@pytest.fixture
def failing_server() -> Iterator[str]:
    """A server that answers every request with 500."""

    class Failing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(500)
            self.send_header("content-length", "0")
            self.end_headers()

        do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


TRAIN = """
import sys
from lightning import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from callbacks.run_folder.loggers import LogConfiguration, ResilientWandbLogger
logger = ResilientWandbLogger(save_dir=sys.argv[1], start_timeout=2.0)
trainer = Trainer(max_steps=2, logger=logger, accelerator="cpu", enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    callbacks=[LogConfiguration({"model": {"class_path": "a.B", "init_args": {"epsilon": 0.5}}})])
trainer.fit(BoringModel())
print("trained", trainer.global_step)
"""


def train_with_wandb(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Two steps with the W&B logger in a process of its own, as W&B's state is the process's."""
    folder.mkdir()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", TRAIN, str(folder)],
        cwd=ROOT,
        env=inherited | {"WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_kept(folder: Path, out: str, err: str) -> None:
    assert "trained 2" in out, err
    assert "W&B cannot be used" in err
    assert "Traceback" not in err
    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    # The configuration and the last step are in the record that `wandb sync` sends.
    assert b"model.epsilon" in record.read_bytes()


def test_a13_wandb_without_network_key_or_a_working_server_costs_seconds_not_the_run(
    tmp_path: Path, failing_server: str
) -> None:
    nobody, began = "http://127.0.0.1:9", time.monotonic()
    given = {
        "no network": {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": nobody},
        "server that answers 500": {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": failing_server},
        "key that is too short": {"WANDB_API_KEY": "short", "WANDB_BASE_URL": nobody},
    }
    # Side by side: they wait more than they compute.
    running = {name: train_with_wandb(tmp_path / name, **own) for name, own in given.items()}
    for name, process in running.items():
        assert_kept(tmp_path / name, *process.communicate(timeout=120))
    assert time.monotonic() - began < 100


class GoneRun:
    """A W&B run whose service goes away after the start."""

    id, name, dir = "x", "x", "x/files"

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("the server went away")


def test_a13_wandb_server_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("wandb.init", lambda **_: GoneRun())
    logger = ResilientWandbLogger(save_dir=str(tmp_path))
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_hyperparams({"a": 1})
    logger.log_table("samples", columns=["a"], data=[["b"]])
    logger.finalize("success")
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning == "W&B logging stopped (ConnectionError: the server went away); the CSV log goes on"


CONFIG = {
    "seed_everything": 0,
    "model": {
        "class_path": "x.Model",
        "init_args": {
            "attack": {"class_path": "x.EmbeddingPGD", "init_args": {"epsilon": 0.1}},
            "layers": [1, 3],
        },
    },
    "data": {"init_args": {"harmful": [{"class_path": "x.Rows", "init_args": {"split": "train"}}]}},
}


FLAT = {
    "seed_everything": 0,
    "model.class": "Model",
    "model.attack.class": "EmbeddingPGD",
    "model.attack.epsilon": 0.1,
    "model.layers": [1, 3],
    "data.harmful.0.class": "Rows",
    "data.harmful.0.split": "train",
}


def test_a17_hyperparameters_are_flat_with_readable_names() -> None:
    assert flat(CONFIG) == FLAT


def test_a17_hyperparameters_reach_every_logger(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    loggers = [
        RunCSVLogger(str(tmp_path)),
        TensorBoardLogger(str(tmp_path), name="tb"),
    ]
    trainer = Trainer(
        max_steps=1,
        logger=loggers,
        callbacks=[LogConfiguration(CONFIG)],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(BoringModel())
    assert yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text()) == FLAT
    (events,) = (
        path for path in (tmp_path / "tb").rglob("events*") if b"model.attack.epsilon" in path.read_bytes()
    )
    assert b"EmbeddingPGD" in events.read_bytes()
