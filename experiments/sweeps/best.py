"""The best trial's values as a YAML file: one more `--config` repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from experiments.config.compose import compose, merge
from experiments.sweeps.definition import Sweep
from experiments.sweeps.trials import configuration


def best_yaml(sweep: Sweep, values: Mapping[str, Any], title: str) -> str:
    """What the trial's resolved configuration has that the sweep's files have not, under a header that says
    the command and the values."""
    plain, own = compose(sweep.config, []), configuration(sweep, values)
    changed = _changed(plain, own)
    if merge(plain, changed) != own:
        changed = own  # what the trial has taken away no file on top can say
    trainer = changed.get("trainer")
    if isinstance(trainer, dict) and trainer.pop("default_root_dir", None) and not trainer:
        changed.pop("trainer")
    files = " ".join(f"--config {file}" for file in sweep.config)
    said = yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=200)
    lines = [f"{title}. Repeat it: thundercat fit {files} --config best.yaml", *said.splitlines()]
    header = "".join(f"# {line}\n" for line in lines)
    return header + yaml.safe_dump(changed, sort_keys=False)


def _changed(plain: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `own` that differ, a class with its arguments where the class does."""
    found: dict[str, Any] = {}
    for key, value in own.items():
        before = plain.get(key)
        if value == before and isinstance(value, bool) == isinstance(before, bool):
            continue
        same_class = isinstance(before, Mapping) and isinstance(value, Mapping)
        if same_class and value.get("class_path") == before.get("class_path"):  # type: ignore[union-attr]
            found[key] = _changed(before, value)  # type: ignore[arg-type]
        else:
            found[key] = value
    return found
