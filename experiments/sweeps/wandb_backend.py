"""The same sweep by Weights & Biases' own engine: their server searches, their agent starts `fit`.

What is ours (constraints, the best trial on test, what is kept on disk) they do not know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from callbacks.run_folder.loggers import has_wandb_key
from callbacks.run_folder.provenance import write_whole
from experiments.config.errors import ConfigError
from experiments.config.files import find, read
from experiments.studies.scheduling import digest
from experiments.sweeps.definition import WANDB, Sweep

LOGGER = "configs/trainer/wandb.yaml"
PROJECT = "thundercat"


def wandb_sweep(path: str, sweep: Sweep, place: Path) -> dict[str, Any]:
    """The file as `wandb sweep` takes it: without our own keys, with the command that the agent starts.

    A trial's folder has the name that W&B gives its run.

    Raises: ConfigError for a value that the agent cannot hand on.
    """
    node = read(find(path, None, "sweep"))
    if sweep.conditions:
        raise ConfigError("conditions: W&B's format has none; use --backend local, slurm or ray")
    for key, own in sweep.parameters.items():
        if None in (own.get("values") or [own.get("value", "")]):
            raise ConfigError(f"parameters.{key}: the agent would write null as None; leave the value out")
    files = [f"--config={file}" for file in (*sweep.config, LOGGER)]
    folder = f"--trainer.default_root_dir={place}/${{oc.env:WANDB_RUN_ID}}"
    command = ["${env}", "${program}", "fit", *files, folder, "${args}"]
    return {
        "program": "thundercat",
        "command": command,
        "project": PROJECT,
        "name": Path(path).stem,
        **{key: value for key, value in node.items() if key in WANDB},
    }


def run_agent(path: str, sweep: Sweep, place: Path) -> int:
    """Register the sweep, where an earlier start has not, and run its trials. Returns the exit status.

    What W&B calls it is kept in the sweep's folder: a start after a kill goes on with it. Raises: ConfigError
    without a key.
    """
    import wandb

    content = wandb_sweep(path, sweep, place)
    if not has_wandb_key():
        raise ConfigError(
            "--backend wandb: no key of Weights & Biases was found; `wandb login`, or --dry_run prints the "
            "file for `wandb sweep`"
        )
    kept = place / f"wandb_{digest(content)}.txt"
    if not kept.is_file():
        place.mkdir(parents=True, exist_ok=True)
        registered = wandb.sweep(content, project=content["project"], entity=sweep.entity)
        write_whole(kept, registered)
    name = kept.read_text(encoding="utf-8").strip()
    print(f"further agents: wandb agent {content['project']}/{name}")
    wandb.agent(name, project=content["project"], entity=sweep.entity, count=sweep.run_cap)
    return 0
