"""Which share of the positions that a training step computes holds a token of it; the rest is padding.

    python -m experiments.benchmarks.positions --out experiments/results/positions_cpu_202611   # a minute

The rows of the 7B recipe, HarmBench's and Dolly's by the Llama-2 tokenizer, 8 and 56 a step in the shipped
order, over a number of steps. Counts are exact. An attack's rows are counted as they are (prompt and reply
without a gap) and as a batch holds them (prompts padded on the left, replies on the right).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from callbacks.run_folder.provenance import environment_facts
from datamodules.division import Division
from datamodules.streams import Stream
from experiments.benchmarks.rows import natural_examples

HARMFUL, UTILITY = 8, 56


def share(batches: Iterable[Sequence[Sequence[int]]]) -> float:
    """Of positions that hold a token: a row is the lengths of its parts, each padded to the longest of its
    batch."""
    used = computed = 0
    for batch in batches:
        used += sum(map(sum, batch))
        computed += len(batch) * sum(map(max, zip(*batch, strict=True)))
    return used / computed


def joined(batch: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows whose parts stand together."""
    return [[sum(row)] for row in batch]


def measure(steps: int, window: int) -> dict[str, float]:
    """Useful shares of the attack, of the pass over both replies and of the utility rows' passes."""
    harmful, chats = natural_examples()
    first = Stream([example.length for example in harmful], HARMFUL, 0, window)
    second = Stream([example.length for example in chats], UTILITY, 1, window)
    attacked: list[list[list[int]]] = []
    both: list[list[list[int]]] = []
    for step in range(steps):
        rows = [harmful[i] for i in first.batch(step)]
        # A reply's last token is not fed.
        attacked.append([[len(row.prompt.ids), len(row.harmful) - 1] for row in rows])
        both.append([[len(row.prompt.ids), len(row.safe) - 1, len(row.harmful) - 1] for row in rows])
    size = Division(HARMFUL, UTILITY, 8, utility_batch=UTILITY // 8).rows("utility")
    passes = [
        [[chats[i].length] for i in second.batch(step)[start : start + size]]
        for step in range(steps)
        for start in range(0, UTILITY, size)
    ]
    return {
        "attack, as a batch": share(attacked),
        "attack": share(map(joined, attacked)),
        "both replies, as a batch": share(both),
        "both replies without gaps (not done)": share(map(joined, both)),
        f"utility, {size} rows a pass": share(passes),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write `positions.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=64, help="optimiser steps counted")
    parser.add_argument("--window", type=int, default=8, help="data.bucket_window")
    parser.add_argument("--out", type=Path, default=None, help="folder to write the figures to")
    options = parser.parse_args(arguments)
    report = {
        "steps": options.steps,
        "window": options.window,
        "useful": measure(options.steps, options.window),
    }
    print(json.dumps(report), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"environment": environment_facts(), **report}
        (options.out / "positions.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
