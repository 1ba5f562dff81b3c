"""The best trial as a YAML file that repeats it, one more `--config`, and all of its configuration beside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from callbacks.run_folder.folder import CONFIG_FILE
from callbacks.run_folder.provenance import dumped
from experiments.config.compose import ConfigError, compose
from experiments.config.defaults import CSV
from experiments.sweeps.definition import Sweep
from experiments.sweeps.trials import configuration

BEST, RESOLVED = "best.yaml", "best_config.yaml"
"""Names of the two files in the sweep's folder."""


def copy_resolved(folder: Path, place: Path) -> None:
    """Put the configuration that the trial ran with, every field of it but its folder, beside `best.yaml`.

    Args:
        folder: the trial's.
        place: the sweep's.
    """
    if (folder / CONFIG_FILE).is_file():
        own = _without_folder(yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")))
        (place / RESOLVED).write_text(dumped(own), encoding="utf-8")
    else:  # of another trial, which was the best one before
        (place / RESOLVED).unlink(missing_ok=True)


def remove_best(place: Path) -> None:
    """What an earlier best trial has left in the sweep's folder: now none is."""
    for name in (BEST, RESOLVED):
        (place / name).unlink(missing_ok=True)


def write_best(sweep: Sweep, values: Mapping[str, Any], title: str, path: Path) -> None:
    """Write what the trial's resolved configuration has that the sweep's files have not, or all of it where
    no file on top of them can say that (an argument that the trial has taken away); its header says the
    command and the values."""
    own = _without_folder(configuration(sweep, values))
    try:
        _write(path, _changed(compose(sweep.config, []), own), [*sweep.config, path.name], values, title)
        repeats = _without_folder(compose([*sweep.config, str(path)], [])) == own
    except ConfigError:  # files that are complete with a trial's values alone
        repeats = False
    if not repeats:
        _write(path, own, [path.name], values, title)


def _write(
    path: Path, content: Mapping[str, Any], files: list[str], values: Mapping[str, Any], title: str
) -> None:
    options = " ".join(f"--config {file}" for file in files)
    said = yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=200)
    lines = [f"{title}. Repeat it: thundercat fit {options}", *said.splitlines()]
    header = "".join(f"# {line}\n" for line in lines)
    path.write_text(header + yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")


def _without_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every run has a folder of its own, and its log there."""
    trainer = dict(config["trainer"])
    log = {"class_path": CSV, "init_args": {"save_dir": trainer.pop("default_root_dir", None)}}
    if isinstance(trainer.get("logger"), list):
        trainer["logger"] = [own for own in trainer["logger"] if own != log]
    return {**config, "trainer": trainer}


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
