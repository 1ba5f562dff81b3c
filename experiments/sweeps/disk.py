"""The disk that a sweep takes: the best trials keep model and checkpoints, the others their results alone."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from optuna.trial import TrialState

from callbacks.run_folder.folder import RunFolder
from experiments.sweeps.search import FOLDER, Search
from experiments.sweeps.trials import TRIALS


def tidy(search: Search, place: Path, busy: Collection[Path]) -> None:
    """Remove models and checkpoints of trials that are over and not among the best.

    A trial that failed keeps what it has. Nothing outside the sweep's own folder is touched, nor what a link
    in it leads to.

    Args:
        search: knows the trials.
        place: the sweep's folder.
        busy: folders of trials that are not over.
    """
    if search.sweep.keep is None:
        return
    ranked = [own.user_attrs[FOLDER] for own in search.ranked()]
    pruned = [own for own in search.trials() if own.state == TrialState.PRUNED]
    # Trials with the same values share a folder.
    kept = {*list(dict.fromkeys(ranked))[: search.sweep.keep], *(path.name for path in busy)}
    for name in {*ranked, *(own.user_attrs[FOLDER] for own in pruned)} - kept:
        folder = place / TRIALS / name
        if (
            folder.is_dir()
            and not folder.is_symlink()
            and folder.resolve().parent == (place / TRIALS).resolve()
        ):
            _slim(folder)


def _slim(folder: Path) -> None:
    own = RunFolder.of(folder)
    for path in (own.model, own.merged, own.checkpoints, *folder.glob("model_step_*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
