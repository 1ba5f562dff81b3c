"""A sweep whose trials are a program that behaves as the parameter `vars.method` tells it: it works, fails,
lags, is slow, does not end, is killed, stops the sweep, edits its recipe, finds the disk full. It writes
rows as a run does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from experiments.studies.scheduling import Job
from experiments.sweeps.backends import Backend, Local
from experiments.sweeps.definition import load_sweep
from experiments.sweeps.engine import Engine
from experiments.sweeps.search import Search
from experiments.sweeps.space import space_of
from experiments.sweeps.trials import job_of

PROGRAM = """
import json, os, pathlib, signal, sys, time
command, *words = sys.argv[1:]
given = dict(word[2:].split("=", 1) for word in words if "=" in word)
folder, how = pathlib.Path(given["trainer.default_root_dir"]), given["vars.method"]
with open("calls.txt", "a") as stream:
    stream.write(f"{command} {folder.name[:10]}\\n")
if how == "fails" or how == "fails once" and not (folder / "once").exists():
    (folder / "once").touch()
    sys.exit("thundercat: broken on purpose")
if how == "wrong":
    print("thundercat: x: unknown field")
    sys.exit(2)
if how == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if how == "edits":  # somebody changes the recipe meanwhile
    path = pathlib.Path("place/recipe.yaml")
    path.write_text(path.read_text().replace("name_or_path:", "load_seed: 7\\n      name_or_path:"))
if how == "full" and not pathlib.Path("room").exists():
    sys.exit("thundercat: x: no space left on the disk; make room, then go on with --ckpt_path last")
if how == "stops" and not pathlib.Path("stopped").exists():
    pathlib.Path("stopped").touch()
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if how == "killed" or how == "killed once" and not (folder / "once").exists():
    (folder / "once").touch()
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint = folder / "checkpoints" / "step_000001.ckpt"
for path in (checkpoint, folder / "model" / "weights", folder / "rows" / "x"):
    path.parent.mkdir(parents=True, exist_ok=True)
checkpoint.touch()
(folder / "model" / "weights").touch()
parent = os.getppid()
(folder / "parent").write_text(str(parent))
(folder / "own").write_text(str(os.getpid()))
while how == "slow" and not pathlib.Path("go").exists():
    time.sleep(0.05)
    if os.getppid() != parent:  # as a real command does
        os._exit(143)

def write(step, quantity, subject, attack, judge, share):
    own = {"stage": "fit" if command == "fit" else "test", "step": step, "model": str(step), "settings": "s"}
    own |= {"subject": subject, "attack": attack, "schema": 2}
    with open(folder / "rows" / "measurements.jsonl", "a") as stream:
        more = {"evaluation": "e", "quantity": quantity, "judge": judge, "refusal": "", "judges": []}
        more |= {"n": 10, "call": "" if command == "fit" else "c"}
        stream.write(json.dumps(own | more) + "\\n")
    with open(folder / "rows" / "rows_rank0.jsonl", "a") as stream:
        for i in range(10):
            row = {"example": str(i), "repetition": 0, "prompt": "p", "system": None, "expected": ""}
            row |= {"category": "", "functional": "", "attacked": None, "history": [], "prefill": ""}
            row |= {"loss_curve": [], "steps": 0, "forward_passes": 0, "backward_passes": 0, "queries": 0}
            row |= {"seconds": 0.0, "flags": {}}
            row |= {"reply": "r", "verdicts": {judge: {"verdict": i < round(10 * share), "score": None}}}
            stream.write(json.dumps(own | row) + "\\n")

def measure(step, robust, utility):
    write(step, "success_rate", "harmful", "embedding", "target_prefix@1", 1 - robust)
    write(step, "exact_match", "utility", "", "exact_match@1", utility)

measure(0, 0.2, 1.0)
epsilon = float(given.get("vars.epsilon", 0.1))
if how == "untrained":
    sys.exit(0)
if how == "lags":
    measure(10, 0.1, 1.0)
    time.sleep(60)
measure(20, epsilon, 1.3 - epsilon)
"""
PGD = "lightning_modules.attacks.embedding.pgd.EmbeddingPGD"
RECIPE = {
    "vars": {"method": "works", "epsilon": 0.1, "b": 0, "c": 0},
    "trainer": {"default_root_dir": "runs/x"},
    "model": {
        "class_path": "lightning_modules.adversarial.AdversarialFineTuning",
        "init_args": {
            "base": {"name_or_path": "${vars.method}"},
            "attack": {"class_path": PGD, "init_args": {"epsilon": "${vars.epsilon}"}},
        },
    },
}
"""As small as a configuration can be whose values are a trial's."""
COLUMNS = {
    "embedding": {"quantity": "success_rate", "subject": "harmful", "attack": "embedding"},
    "utility": {"quantity": "exact_match", "subject": "utility"},
}


class Sweeping:
    """A sweep with the program in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "place"
        self.place.mkdir(parents=True)
        (folder / "program.py").write_text(PROGRAM)
        self.program = (sys.executable, str(folder / "program.py"))

    def engine(self, backend: Backend | None = None, workers: int = 1, **changes: Any) -> Engine:
        given = {
            "method": "grid",
            "metric": {"name": "eval/harmful/embedding/success_rate", "goal": "minimize"},
            "config": [self._written("recipe", RECIPE)],
            "columns": COLUMNS,
            "test": [self._written("test", {"seed_everything": 1})],
        }
        sweep = load_sweep(self._written("sweep", given | changes))
        search = Search(sweep, space_of(sweep), self.place, "study", workers)
        return Engine(search, backend or Local(workers, self.program), workers, self.place)

    def job(self, method: str, epsilon: float = 0.5) -> Job:
        """One trial beside the sweep."""
        sweep = self.engine(parameters={"vars.epsilon": {"values": [0.5]}}).search.sweep
        return job_of(sweep, {"vars.method": method, "vars.epsilon": epsilon}, 9, self.place)

    def _written(self, name: str, content: Any) -> str:
        path = self.place / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    def calls(self) -> list[str]:
        """What the program was asked: command and first letters of the folder."""
        path = self.place.parent / "calls.txt"
        return path.read_text().splitlines() if path.is_file() else []


def parameters(method: list[str], epsilon: list[float]) -> dict[str, Any]:
    return {"vars.method": {"values": method}, "vars.epsilon": {"values": epsilon}}


def states(engine: Engine) -> list[str]:
    return [own.state.name for own in engine.search.trials()]
