"""What decides a reply, as one digest: whether a stored row is still the answer to what is asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from datamodules.batch import EvaluationBatch
from datamodules.contents import ROW_FILES, fingerprint
from datamodules.results import ROWS

MODEL = "config.json"
"""In a model's folder."""


def contents(batch: EvaluationBatch) -> list[Any]:
    """What a model or an attack sees of a batch, as JSON."""
    tensors = [batch.prompt_ids, batch.prompt_mask]
    if batch.adversarial is not None:
        sent = batch.adversarial
        tensors += [sent.attackable_mask, sent.harmful_ids, sent.harmful_mask]
    # What a reply is compared with beside its target: of other rows there is none, as before.
    compared = [list(own) for own in (batch.answers, batch.forbidden) if any(own)]
    return [*(tensor.tolist() for tensor in tensors), *compared]


def settings_digest(*things: object, own_run: Path | None = None) -> str:
    """Digest of everything that decides a reply, from the public attributes of its objects.

    Args:
        things: the objects.
        own_run: the run folder that the results are written to, where they may name it: an attack that reads
            its own run's rows would be another one after every row, so that it counts by its name.
    """
    own = None if own_run is None else own_run.resolve()
    return hashlib.blake2b(
        json.dumps([describe(thing, own) for thing in things], sort_keys=True).encode(), digest_size=6
    ).hexdigest()


def describe(thing: object, own_run: Path | None = None) -> Any:
    """Public attributes, recursively, as JSON; objects without any are named by their class.

    Of a text that names a file or a model's folder, its content too: templates, data and weights decide a
    reply by what is in them.
    """
    if isinstance(thing, str | Path):
        content = _content(str(thing), own_run)
        return str(thing) if content is None else {"file": str(thing), "digest": content}
    if thing is None or isinstance(thing, bool | int | float):
        return thing
    if isinstance(thing, Enum):
        return thing.name
    if isinstance(thing, set | frozenset):
        return sorted((describe(item, own_run) for item in thing), key=repr)
    if isinstance(thing, torch.Tensor):
        return thing.tolist()
    if isinstance(thing, type | FunctionType):
        return f"{thing.__module__}.{thing.__qualname__}"
    if isinstance(thing, list | tuple):
        return [describe(item, own_run) for item in thing]
    if isinstance(thing, dict):
        return {str(key): describe(value, own_run) for key, value in thing.items()}
    held = vars(thing) if hasattr(thing, "__dict__") else {}
    names = [name for name in held if not _is_cached(thing, name)]
    names += [f.name for f in fields(thing)] if is_dataclass(thing) and not names else []  # with slots
    attributes = {name: describe(getattr(thing, name), own_run) for name in names if not name.startswith("_")}
    return {"class": f"{type(thing).__module__}.{type(thing).__qualname__}", **attributes}


def _content(name: str, own_run: Path | None) -> str | None:
    """Of what a text names; of another run, its rows: not its reports, which are written again and again."""
    try:
        folder = Path(name) if name else None
        is_run = folder is not None and (folder / ROWS).is_dir() and not (folder / MODEL).is_file()
        if is_run and folder is not None and folder.resolve() == own_run:
            return None
    except (OSError, ValueError):
        return None  # no path
    return fingerprint(name, ROW_FILES) if is_run else fingerprint(name)


def _is_cached(thing: object, name: str) -> bool:
    """Whether an attribute is a property's remembered value, which is not there before it is asked for: a
    setting is there from the beginning."""
    return isinstance(getattr(type(thing), name, None), cached_property)
