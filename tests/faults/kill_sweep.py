"""kill -9 at random moments of a short run, resume each, compare with the run that nobody stopped.

    python -m tests.faults.kill_sweep [--kills 20] [--seed 0] [--folder FOLDER]

Every second moment is drawn over the whole life of the process, the others over its steps: start-up,
evaluation, steps, checkpoints, export. Compared are weights, rows (each once), log and cost. Takes about half
a minute a kill; not part of the test suite.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from callbacks.report.training_log import read_training_log
from datamodules.results import read_rows
from tests.support.small_run import equal, small_config, start, trained

CALLBACKS = """[
  {class_path: callbacks.cost.CostMonitor},
  {class_path: callbacks.evaluations.refusal.RefusalEvaluation,
   init_args: {schedule: {at_start: true, limit: 4}, max_new_tokens: 8}},
  {class_path: callbacks.run_folder.export.ExportModel},
  {class_path: callbacks.run_folder.checkpoints.RunCheckpoints}]"""
EVALUATED = """{harmful: [
  {class_path: datamodules.sources.tinychat.sources.TinyChatHarmful, init_args: {split: validation}}]}"""
TIMED = ("cost/tokens_per_second", "cost/peak_memory_mib")


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on kills."""
    rows = [{**vars(row), "seconds": 0.0, "where": ""} for row in read_rows(folder)]
    lines = sum(len(path.read_text().splitlines()) for path in folder.glob("rows/rows_rank*.jsonl"))
    log = [
        {key: value for key, value in row.items() if key not in TIMED} for row in read_training_log(folder)
    ]
    cost = json.loads((folder / "cost.json").read_text())
    return {"rows": rows, "lines": lines, "log": log, "passes": cost["passes"]}


def await_file(process: Any, path: Path) -> None:
    """Until the file or a newer one is there, or the process has ended."""
    while process.poll() is None and not any(newer >= path for newer in path.parent.glob("step_*.ckpt")):
        time.sleep(0.002)


def sweep(folder: Path, kills: int, seed: int) -> int:
    """How many of the killed and resumed runs equal the whole one."""
    torch.set_num_threads(1)
    config = small_config(folder)
    common = (f"--trainer.callbacks={CALLBACKS}", f"--data.evaluation={EVALUATED}", "--trainer.max_steps=6")

    def begin(name: str, *more: str) -> Any:
        return start("fit", config, *common, f"--trainer.default_root_dir={folder / name}", *more)

    began = time.monotonic()
    out, _ = begin("whole").communicate()
    life = time.monotonic() - began
    whole, weights = outcome(folder / "whole"), trained(folder / "whole")
    rng, same = random.Random(seed), 0
    for number in range(kills):
        name = f"killed_{number:02d}"
        started, process, moment = time.monotonic(), begin(name), rng.uniform(0.0, life)
        if number % 2:
            # Start-up takes most of so short a life: every second kill falls among the steps.
            step = rng.randint(1, 6)
            await_file(process, folder / name / "checkpoints" / f"step_{step:06d}.ckpt")
            time.sleep(rng.uniform(0.0, 0.3))
        else:
            time.sleep(moment)
        moment = time.monotonic() - started
        process.kill()
        process.communicate()
        stood = max(
            (path.stem for path in (folder / name).glob("checkpoints/step_*.ckpt")), default="no checkpoint"
        )
        out, _ = begin(name, "--ckpt_path=last").communicate()
        found = outcome(folder / name) if (folder / name / "cost.json").is_file() else {}
        differing = [key for key in whole if found.get(key) != whole[key]]
        differing += [] if equal(trained(folder / name), weights) else ["weights"]
        same += not differing
        print(
            f"{number:2d}  killed at {moment:5.1f} s of {life:.1f} ({stood}): {differing or 'identical'}",
            flush=True,
        )
        if differing:
            print(out[-2000:])
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    call = parser.parse_args()
    place = call.folder or Path(tempfile.mkdtemp(prefix="kill_sweep_"))
    place.mkdir(parents=True, exist_ok=True)
    print(f"{sweep(place, call.kills, call.seed)} of {call.kills} identical")
