"""A command line in a process of its own that has imported already what this one has: a fresh interpreter
spends more time on importing than most tests compute."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from experiments import process
from experiments.cli import main
from experiments.commands import run


def forked(words: Sequence[str], output: Path, **environment: str) -> BaseProcess:
    """Start `thundercat WORDS`; what it says goes to a file. Its exit code is the command's.

    Raises: RuntimeError where this process has several threads, behind which its child would hang.
    """
    if torch.get_num_threads() > 1:
        raise RuntimeError(
            "expected OMP_NUM_THREADS=1, as `make test` sets it: a forked process hangs behind threads"
        )
    child = multiprocessing.get_context("fork").Process(target=_command, args=(words, output, environment))
    child.start()
    return child


def in_two_processes(words: Sequence[str], folder: Path, *strategy: str) -> None:
    """One training in two processes that are started as by a cluster's launcher; by DDP unless said
    otherwise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    words = [*words, "--trainer.devices=2", *(strategy or ["--trainer.strategy=ddp"])]
    outputs = [folder / f"output_{rank}.txt" for rank in range(2)]
    children = [forked(words, own, LOCAL_RANK=str(rank), **common) for rank, own in enumerate(outputs)]
    for child in children:
        child.join(300)
    said = "".join(own.read_text()[-2000:] for own in outputs)
    assert [child.exitcode for child in children] == [0, 0], said


def _command(words: Sequence[str], output: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Who started it is this test, not who started the tests.
    run.STARTED_BY = process.STARTED_BY = os.getppid()  # type: ignore[attr-defined]
    sys.exit(main(words))
