"""The disk that a sweep takes: the best trials keep model and checkpoints, the others their results alone."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from optuna.trial import TrialState

from callbacks.run_folder.folder import RunFolder
from experiments.sweeps.search import FOLDER, Search
from experiments.sweeps.trials import TRIALS

PROBE = 1 << 20
"""Bytes that a disk which is not full takes."""


def tidy(search: Search, place: Path, busy: Collection[Path]) -> None:
    """Remove models and checkpoints of trials that are over and not among the best.

    Nothing outside the sweep's own folder is touched, nor what a link
    in it leads to.

    Args:
        search: knows the trials.
        place: the sweep's folder.
        busy: folders of trials that are not over.
    """
    if search.sweep.keep is None:
        return
    ranked = [own.user_attrs[FOLDER] for own in search.ranked()]
    useless = [own for own in search.trials() if own.state in (TrialState.PRUNED, TrialState.FAIL)]
    # Trials with the same values share a folder.
    kept = {*list(dict.fromkeys(ranked))[: search.sweep.keep], *(path.name for path in busy)}
    for name in {*ranked, *(own.user_attrs[FOLDER] for own in useless if FOLDER in own.user_attrs)} - kept:
        folder = place / TRIALS / name
        if (
            folder.is_dir()
            and not folder.is_symlink()
            and folder.resolve().parent == (place / TRIALS).resolve()
        ):
            _slim(folder)


def is_full(place: Path) -> bool:
    """Whether a small file finds no room any more."""
    try:
        with tempfile.TemporaryFile(dir=place) as stream:
            stream.write(bytes(PROBE))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def _slim(folder: Path) -> None:
    own = RunFolder.of(folder)
    for path in (own.model, own.merged, own.checkpoints, *folder.glob("model_step_*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
