"""What a README tells its reader to type, so that tests can try it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

READMES = sorted(
    path for path in ROOT.rglob("README.md") if not {".venv", "node_modules", "results"} & set(path.parts)
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a README."""

    path: Path
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Its lines, those that end in a backslash joined with the next."""
        return self.text.replace("\\\n", " ").splitlines()


def blocks(path: Path) -> list[Block]:
    found = re.findall(
        r"^```(\w*)[^\n]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [Block(path, language, text) for language, text in found]


def commands(path: Path, program: str) -> list[str]:
    """The block lines of a README that call a program, without prompt and comment."""
    lines = (line.removeprefix("$ ").strip() for block in blocks(path) for line in block.lines)
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith(f"{program} ")]


def own_files(path: Path) -> dict[str, str]:
    """The YAML and data files that a README shows in full: blocks that begin with `# NAME`."""
    named = (re.match(r"# ([\w./-]+\.(?:yaml|jsonl|csv))\b", block.text) for block in blocks(path))
    pairs = zip(named, blocks(path), strict=True)
    return {match[1]: block.text for match, block in pairs if match}
