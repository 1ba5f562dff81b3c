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
from datamodules.contents import LOCK, RUN_FILES, fingerprint
from datamodules.results import ROWS


def contents(batch: EvaluationBatch) -> list[Any]:
    """What a model or an attack sees of a batch, as JSON."""
    tensors = [batch.prompt_ids, batch.prompt_mask]
    if batch.adversarial is not None:
        sent = batch.adversarial
        tensors += [sent.attackable_mask, sent.harmful_ids, sent.harmful_mask]
    # What a reply is compared with beside its target: of other rows there is none, as before.
    compared = [list(own) for own in (batch.answers, batch.forbidden) if any(own)]
    return [*(tensor.tolist() for tensor in tensors), *compared]


def settings_digest(*things: object) -> str:
    """Digest of everything that decides a reply, from the public attributes of its objects."""
    return hashlib.blake2b(
        json.dumps([describe(thing) for thing in things], sort_keys=True).encode(), digest_size=6
    ).hexdigest()


def describe(thing: object) -> Any:
    """Public attributes, recursively, as JSON; objects without any are named by their class.

    Of a text that names a file or a model's folder, its content too: templates, data and weights decide a
    reply by what is in them.
    """
    if isinstance(thing, str | Path):
        content = _content(str(thing))
        return str(thing) if content is None else {"file": str(thing), "digest": content}
    if thing is None or isinstance(thing, bool | int | float):
        return thing
    if isinstance(thing, Enum):
        return thing.name
    if isinstance(thing, set | frozenset):
        return sorted((describe(item) for item in thing), key=repr)
    if isinstance(thing, torch.Tensor):
        return thing.tolist()
    if isinstance(thing, type | FunctionType):
        return f"{thing.__module__}.{thing.__qualname__}"
    if isinstance(thing, list | tuple):
        return [describe(item) for item in thing]
    if isinstance(thing, dict):
        return {str(key): describe(value) for key, value in thing.items()}
    held = vars(thing) if hasattr(thing, "__dict__") else {}
    names = [name for name in held if not _is_cached(thing, name)]
    names += [f.name for f in fields(thing)] if is_dataclass(thing) and not names else []  # with slots
    attributes = {name: describe(getattr(thing, name)) for name in names if not name.startswith("_")}
    return {"class": f"{type(thing).__module__}.{type(thing).__qualname__}", **attributes}


def _content(name: str) -> str | None:
    """Of what a text names; of a run, its rows and weights, not its reports. A run that is being written to
    has its name alone: an attack that reads its own run's rows would be another one after every row."""
    folder = Path(name)
    try:
        is_run = bool(name) and (folder / ROWS).is_dir()
    except (OSError, ValueError):
        return None  # no path
    if not is_run:
        return fingerprint(name)
    return None if (folder / LOCK).exists() else fingerprint(name, RUN_FILES)


def _is_cached(thing: object, name: str) -> bool:
    """Whether an attribute is a property's remembered value, which is not there before it is asked for: a
    setting is there from the beginning."""
    return isinstance(getattr(type(thing), name, None), cached_property)
