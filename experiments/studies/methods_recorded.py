"""What a comparison's folder already holds, so that another machine goes on with the rest; or why it cannot
be used: a folder of which a part is missing is never taken for a smaller comparison."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from callbacks.run_folder.folder import RunFolder
from experiments.studies.archive import archived
from experiments.studies.methods_search import NO_DEFENCE

SEARCH, RESULTS = "search.json", "results.json"
Recorded = dict[str, dict[int, Path]]


def recorded(out: Path, seeds: Sequence[int], steps: int, known: Collection[str]) -> Recorded:
    """The judged runs by name and seed; nothing where there is no comparison yet.

    Args:
        out: the comparison's folder.
        seeds: those of every method.
        steps: of every training.
        known: names of the methods that there are.

    Raises: ValueError where it is of other seeds, steps or methods, or a part of it is missing or damaged.
    """
    path = out / RESULTS
    if not path.is_file():
        return {}
    try:
        names = [*_mapping(path)["runs"]]
        found = archived(out, names)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not the results of a comparison ({error!r:.80}); {_remedy(out)}"
        ) from error
    searches = searched(out) if any(name != NO_DEFENCE for name in names) else {}
    for name, folders in found.items():
        wanted = set(seeds[:1] if name == NO_DEFENCE else seeds)
        if name != NO_DEFENCE and name not in known:
            raise ValueError(f"{path}: no method is called {name!r}; {_remedy(out)}")
        if not folders:
            raise ValueError(f"{out}: {name} is in {RESULTS}, and its runs are missing; {_remedy(out)}")
        if {*folders} != wanted:
            raise ValueError(
                f"{out}: {name} has seeds {sorted(folders)}, expected {sorted(wanted)}; name another --out"
            )
        if name == NO_DEFENCE:
            continue
        taken = {_steps(folder, out) for folder in folders.values()}
        if taken != {steps}:
            raise ValueError(f"{out}: {name} has {taken} steps, expected {steps}; name another --out")
        if not isinstance(searches.get(name), dict) or "chosen" not in searches[name]:
            raise ValueError(f"{out / SEARCH}: nothing of {name}, which {RESULTS} has; {_remedy(out)}")
    return found


def searched(out: Path) -> dict[str, Any]:
    """What the searches of its methods did. Raises: ValueError."""
    path = out / SEARCH
    if not path.is_file():
        raise ValueError(f"{path}: missing beside {RESULTS}; {_remedy(out)}")
    return _mapping(path)


def _steps(folder: Path, out: Path) -> int:
    path = RunFolder.of(folder).cost
    if not path.is_file():
        raise ValueError(f"{path}: missing; {_remedy(out)}")
    try:
        return int(_mapping(path)["steps"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: no number of steps in it; {_remedy(out)}") from error


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected fields, got {found!r:.60}")
    return found


def _remedy(out: Path) -> str:
    return f"bring {out} back whole (it is recorded with the project), or name another --out"
