"""Attack, training step and GCG step of a model of 7 B's shape on one GPU, ours beside the public code's
schedule: time, share of the card's own matrix rate, memory, launches.

    make bench-gpu                                                                # about 10 minutes, one card
    python -m experiments.benchmarks.gpu --shape toy --device cpu                 # the same code, for a look

Not run by the authors of this file: no card was at hand. Weights are random and in bf16, adapters in fp32
(r 64, all linear layers), arithmetic in bf16-mixed. Sides take turns within a figure. A side that fails (out
of memory, a compiler's refusal) is reported with its error. With bitsandbytes our side is measured on an NF4
base as well.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from callbacks.cost import peak_memory_mib, reset_peak_memory
from callbacks.run_folder.provenance import environment_facts
from experiments.benchmarks.counters import Launches
from experiments.benchmarks.gpu_sides import SHAPES, Call, Model, attacks, build, gcg_steps, training_steps

SIZE = {"cuda": 8192, "cpu": 512}
"""Of the square matrices whose product tells the device's rate."""
FAILURES = (RuntimeError, ValueError, AssertionError, ImportError)
"""What a side may fail with: out of memory and compilers' refusals are among them."""
COLUMNS = ("what", "side", "seconds", "a second", "of the rate", "GiB", "kernels", "waits")


class NoDevice(ValueError):
    """There is nothing to measure on; the text says what to do."""


class Measured(NamedTuple):
    """One call of one side."""

    seconds: float
    mib: float


def matrix_rate(device: torch.device, repeats: int = 5) -> float:
    """Floating-point operations a second of a bf16 product of large square matrices, the best of some."""
    size = SIZE[device.type]
    one = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    one @ one
    taken = min(timed(lambda: one @ one, device).seconds for _ in range(repeats))
    return 2.0 * size**3 / taken


def timed(call: Callable[[], object], device: torch.device) -> Measured:
    """Wait for the device before and after."""
    _wait(device)
    reset_peak_memory()
    began = time.perf_counter()
    call()
    _wait(device)
    return Measured(time.perf_counter() - began, peak_memory_mib())


def said(error: Exception) -> str:
    """What a side failed with, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def measure(
    what: str, calls: Mapping[str, Call], repeats: int, device: torch.device, rate: float
) -> list[dict[str, Any]]:
    """A row for each side; each is called once to be counted, which warms it up too, then all in turn."""
    counts: dict[str, Launches] = {}
    failed: dict[str, str] = {}
    taken: dict[str, list[Measured]] = {name: [] for name in calls}

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except FAILURES as error:
            failed[name] = said(error)

    def count(name: str) -> None:
        other = calls[name].like
        # A dispatch mode and a compiler do not go together.
        counting = Launches() if other is None else nullcontext(counts[other])
        with calls[name].ready(), counting as counts[name]:
            calls[name].run()

    def clock(name: str) -> None:
        with calls[name].ready():
            taken[name].append(timed(calls[name].run, device))

    for name in calls:
        attempt(name, lambda name=name: count(name))  # type: ignore[misc]
    for _ in range(repeats):
        for name in calls:
            if name not in failed:
                attempt(name, lambda name=name: clock(name))  # type: ignore[misc]
    rows: list[dict[str, Any]] = []
    for name, call in calls.items():
        if name in failed:
            rows.append({"what": what, "side": name, "failed": failed[name]})
            continue
        seconds, own = statistics.median(one.seconds for one in taken[name]), counts[name]
        dispatched = call.like is None
        rows.append(
            {
                "what": what,
                "side": name,
                "seconds": seconds,
                "all_seconds": [one.seconds for one in taken[name]],
                "unit": call.unit,
                "per_second": call.units / seconds,
                "flops": own.flops,
                "share_of_matrix_rate": own.flops / seconds / rate,
                "peak_gib": max(one.mib for one in taken[name]) / 1024,
                "kernels": own.kernels if dispatched else None,
                "waits": sum(own.syncs.values()) if dispatched else None,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], rate: float) -> str:
    """All figures in Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        if "failed" in row:
            lines.append((row["what"], row["side"], f"failed: {row['failed']}", *[""] * 5))
            continue
        lines.append(
            (
                row["what"],
                row["side"],
                f"{row['seconds']:.3f}",
                f"{row['per_second']:,.0f} {row['unit']}",
                f"{row['share_of_matrix_rate']:.1%}",
                f"{row['peak_gib']:.1f}",
                "?" if row["kernels"] is None else f"{row['kernels']:,}",
                "?" if row["waits"] is None else str(row["waits"]),
            )
        )
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Matrix rate of the device, measured: {rate / 1e12:,.2f} TFLOP a second in bf16.\n\n{text}\n"


def device_of(name: str) -> torch.device:
    """The device by its name. Raises: NoDevice."""
    device = torch.device(name)
    if device.type not in SIZE:
        raise NoDevice(f"--device: expected cuda or cpu, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NoDevice(
            "--device cuda: expected a CUDA GPU, found none; run it where there is one, or look at the same "
            "code with --shape toy --device cpu"
        )
    return device


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write `gpu.json` and `gpu.md`. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="7b", help="of the model [7b]")
    parser.add_argument("--device", default="cuda", help="cuda or cpu [cuda]")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds per figure [3]")
    parser.add_argument("--only", nargs="*", default=[""], help="figures whose names begin so")
    parser.add_argument(
        "--compile", default=None, help="compiler of our layers: inductor on a GPU [there], none, eager"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder to write the figures to")
    options = parser.parse_args(arguments)
    try:
        device = device_of(options.device)
    except NoDevice as error:
        print(error, file=sys.stderr)
        return 2
    backend = options.compile or ("inductor" if device.type == "cuda" else "none")
    figures: dict[str, Callable[[Model, str], dict[str, Call]]] = {
        "attack": attacks,
        "step": training_steps,
        "gcg": gcg_steps,
    }
    wanted = [what for what in figures if what.startswith(tuple(options.only))]
    if not wanted or options.repeats < 1:
        parser.error(f"expected --repeats of at least 1 and --only among {', '.join(figures)}")
    rate: float = matrix_rate(device)
    rows: list[dict[str, Any]] = []

    def note(taken: list[dict[str, Any]]) -> None:
        """Print rows, and write all of them so far: what fails later costs nothing of it."""
        rows.extend(taken)
        for row in taken:
            print(json.dumps(row), file=sys.stderr, flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            report = {"environment": environment_facts(), "shape": options.shape, "rate": rate, "rows": rows}
            (options.out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            (options.out / "gpu.md").write_text(table(rows, rate), encoding="utf-8")

    bases = ["bf16"] + ["nf4"] * (importlib.util.find_spec("bitsandbytes") is not None)
    for base in bases:
        try:
            model = build(options.shape, device, four_bits=base == "nf4")
        except FAILURES as error:
            note([{"what": base, "side": "the model", "failed": said(error)}])
            continue
        for what in wanted:
            try:
                sides = figures[what](model, backend)
            except FAILURES as error:
                note([{"what": f"{what}, {base}", "side": "both", "failed": said(error)}])
                continue
            note(measure(f"{what}, {base}", sides, options.repeats, device, rate))
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(table(rows, rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
