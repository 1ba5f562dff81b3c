"""A GGUF file as an ordinary model folder: dequantised once into the user's cache, then like any model.

The cache is `$THUNDERCAT_CACHE`, else `$XDG_CACHE_HOME/thundercat`, else `~/.cache/thundercat`. A copy is
named by its source's SHA-256 and holds the SHA-256 of each of its own files: one that was cut short or
changed is made again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
DIGESTS = "digests.json"
FORMAT = 1
"""Of the copies; another number makes them again."""


def cache() -> Path:
    """Folder of everything that can be made again."""
    own = os.environ.get("THUNDERCAT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thundercat"


@functools.cache
def dequantised(file: Path) -> Path:
    """The folder of a GGUF file's fp32 copy, with safetensors, configuration, tokenizer and chat template.

    Raises: ValueError where the file is no GGUF file, transformers does not know its architecture, or the
        library that reads it is missing.
    """
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"gguf_file: {file} is no GGUF file; name one that is")
    folder = cache() / "gguf" / f"{file.stem}-{digest(file)[:16]}-v{FORMAT}"
    if folder.is_dir() and not whole(folder):
        log.warning("%s is damaged: made again from %s", folder, file)
        shutil.rmtree(folder)
    if not folder.is_dir():
        _make(file, folder)
    return folder


def whole(folder: Path) -> bool:
    """Whether every file of a copy is what was written."""
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        return all(digest(folder / name) == wanted for name, wanted in digests.items())
    except (OSError, ValueError):
        return False


def digest(path: Path) -> str:
    """Its SHA-256, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _make(file: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"gguf_file: reading {file.name} needs the package gguf; pip install gguf")
    log.info("dequantising %s into %s, once", file, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        made = Path(place) / "model"
        try:
            _plain(file).save_pretrained(made)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(made)
        except Exception as error:  # cut short, an unknown architecture, an unknown quantisation
            words = " ".join(str(error).split())
            raise ValueError(
                f"gguf_file: cannot read {file} ({type(error).__name__}: {words[:200]}); copy it again, or "
                "take an architecture that transformers knows"
            ) from error
        digests = {path.name: digest(path) for path in sorted(made.iterdir())}
        (made / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:
            # Another process was faster; what it made is the same.
            if not whole(folder):
                raise


def _plain(file: Path) -> PreTrainedModel:
    """The model with nothing left that says it was quantised: transformers refuses to save one that does."""
    read = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    config = type(read.config).from_dict(
        {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model
