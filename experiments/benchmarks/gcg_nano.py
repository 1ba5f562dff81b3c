"""Candidates per second of our GCG against nanoGCG 0.3.0 (PyPI) with its prefix cache, in an environment of
its own, since it needs transformers 4:

    python -m venv runs/nano; runs/nano/bin/pip install torch==2.13.0 nanogcg==0.3.0 "transformers<5"
    python -m experiments.benchmarks.gcg_nano --python runs/nano/bin/python --out FOLDER

Both search 20 tokens behind the same requests of the same weights, taken in turn, each in a process that
stays warm; set-up (prefix, typable tokens) is timed on both sides. nanoGCG's candidates are counted at its
model's forward calls, ours by its own count, and the gradient's passes are left out of both. nanoGCG takes
one behaviour after the other, ours all at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from callbacks.run_folder.provenance import environment_facts
from datamodules.batch import AdversarialBatch
from datamodules.sources.gather import evenly
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.text.encoding import Encoder, EncodingConfig, adversarial_batch
from experiments.api import load
from experiments.benchmarks.gcg import llama
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.models.language_model import LanguageModel

SIDE = Path(__file__).with_name("gcg_nano_side.py")
MODELS = ("llama", "tinychat")


class Nano:
    """nanoGCG in a process of its own, which answers a job at a time.

    Args:
        python: the interpreter of its environment.
        folder: model and tokenizer.
    """

    def __init__(self, python: Path, folder: Path) -> None:
        self.process = subprocess.Popen(
            [str(python), str(SIDE), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._answer()

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(
                f"nanoGCG's process ended with status {self.process.returncode}; --python must name an "
                "environment with nanogcg (what it said stands above)"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end: it stops where its input does."""
        self.process.communicate()


def sized(name: str, behaviours: int) -> tuple[LanguageModel, AdversarialBatch]:
    """A model and requests for it: 20 M parameters at V = 32,000 with random weights, or the packaged one."""
    if name == "llama":
        return llama(behaviours)
    model = load("tinychat:aligned", device="cpu")
    rows = Encoder(model.chat, EncodingConfig(160)).harmful(TinyChatHarmful("validation").rows())
    return model, adversarial_batch(evenly(rows, behaviours), "user")


def measure(python: Path, name: str, width: int, behaviours: int, steps: int, repeats: int) -> dict[str, Any]:
    """Rates of both sides for one shape, medians over interleaved rounds; the first round warms up."""
    model, batch = sized(name, behaviours)
    job = {
        "behaviours": list(zip(batch.prompts, batch.targets, strict=True)),
        "steps": steps,
        "width": width,
        "topk": 256,
    }
    rates: dict[str, list[float]] = {"ours": [], "nanogcg": []}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        model.module.save_pretrained(place)  # type: ignore[operator]
        model.chat.tokenizer.save_pretrained(place)
        other = Nano(python, Path(place))
        for repeat in range(repeats + 1):
            began = time.perf_counter()
            ours = GCG(num_steps=steps, width=width, topk=256, stop_at_target=False)
            found = ours(model, batch, torch.Generator().manual_seed(repeat))
            seconds = time.perf_counter() - began
            theirs = other(job | {"seed": repeat})
            if repeat:
                candidates = int(found.forward_passes.sum()) - steps * len(batch)
                rates["ours"].append(candidates / seconds)
                rates["nanogcg"].append(theirs["candidates"] / theirs["seconds"])
            losses = {
                "ours": float(found.best_loss.mean()),
                "nanogcg": statistics.mean(theirs["best_loss"]),
            }
        other.close()
    medians = {side: statistics.median(values) for side, values in rates.items()}
    return {
        "what": "candidates per second",
        "model": name,
        "width": width,
        "behaviours": behaviours,
        "steps": steps,
        "repeats": repeats,
        "versions": other.versions,
        "mean_best_loss": losses,
        "rates": rates,
        "medians": medians,
        "ratio": medians["ours"] / medians["nanogcg"],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line per figure, write `gcg_nano.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--python", type=Path, required=True, help="interpreter of an environment with nanogcg")
    add("--models", nargs="*", default=[*MODELS], choices=MODELS, help="what is attacked [both]")
    add("--widths", nargs="*", type=int, default=[64, 512], help="candidates a step [64 512]")
    add("--behaviours", type=int, default=4, help="requests [4]")
    add("--steps", type=int, default=4, help="steps a search [4]")
    add("--repeats", type=int, default=3, help="timed rounds a figure, behind one that warms up [3]")
    add("--out", type=Path, help="folder to write the figures to")
    own = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    rows = []
    for name in own.models:
        for width in own.widths:
            rows.append(measure(own.python, name, width, own.behaviours, own.steps, own.repeats))
            print(json.dumps(rows[-1]), flush=True)
    if own.out:
        own.out.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment_facts(), "rows": rows}
        (own.out / "gcg_nano.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
