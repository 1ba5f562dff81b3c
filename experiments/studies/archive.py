"""The raw rows of a study's runs, compressed, beside its tables: anyone can compute every cell again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from callbacks.run_folder.folder import RunFolder
from datamodules.line_files import pack_all
from datamodules.results import ROWS

RUNS = "runs"


def archive(runs: Mapping[str, Mapping[int, Path]], out: Path) -> dict[str, dict[int, Path]]:
    """What the tables are computed from, compressed, beside them: rows, what was to be measured, cost,
    environment and resolved configuration of every judged run; returns the copies."""
    copies: dict[str, dict[int, Path]] = {}
    for name, folders in runs.items():
        for place in _place(out, name).glob("seed*"):
            if place.name not in {f"seed{seed}" for seed in folders}:
                shutil.rmtree(place)  # of an earlier call with more seeds: no table of this one has it
        for seed, folder in folders.items():
            target = _place(out, name) / f"seed{seed}"
            copies.setdefault(name, {})[seed] = target
            if folder == target:  # of an earlier call
                continue
            # What an earlier run of this name had and this one has not must not stay beside it.
            shutil.rmtree(target, ignore_errors=True)
            (target / ROWS).mkdir(parents=True)
            own = RunFolder.of(folder)
            for path in (own.environment("test"), own.config("test"), own.cost):
                if path.is_file():
                    shutil.copy(path, target / path.relative_to(folder))
            pack_all(folder / ROWS, target / ROWS)
    return copies


def archived(out: Path, names: Iterable[str]) -> dict[str, dict[int, Path]]:
    """The copies in a study's folder, by name and seed."""
    return {
        name: dict(
            sorted((int(own.name.removeprefix("seed")), own) for own in _place(out, name).glob("seed*"))
        )
        for name in names
    }


def revisions(runs: Mapping[str, Mapping[int, Path]]) -> list[str]:
    """The code that ran: a study may have gone on over several commits."""
    return sorted({_revision(folder) for folders in runs.values() for folder in folders.values()})


def _revision(folder: Path) -> str:
    git = json.loads(RunFolder.of(folder).environment("test").read_text(encoding="utf-8"))["git"]
    return f"{git['revision']}{' modified' if git['modified'] else ''}"


def _place(out: Path, name: str) -> Path:
    return out / RUNS / slug(name)


def slug(name: str) -> str:
    """A run's name in names of folders: `cat, no attack` -> `cat_no_attack`."""
    return name.replace(", ", "_").replace(" ", "_").replace("/", "_")
