"""What the layout promises: short lines, short files, and no test module that another one needs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.conftest import ROOT

COLUMNS, LINES = 110, 350


def sources() -> list[Path]:
    """Every Python file that belongs to the project."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file()] or sorted(ROOT.glob("*/**/*.py"))


def test_lines_are_short_with_their_pragmas() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > COLUMNS
    ]
    assert long == []


def test_source_files_are_short() -> None:
    own = [path for path in sources() if path.relative_to(ROOT).parts[0] != "tests"]
    assert [str(p) for p in own if len(p.read_text(encoding="utf-8").splitlines()) > LINES] == []


def test_no_test_module_imports_another() -> None:
    pattern = re.compile(r"^from tests\.(?:\w+\.)*test_\w+ import|^import tests\.(?:\w+\.)*test_", re.M)
    assert [str(path) for path in sources() if pattern.search(path.read_text(encoding="utf-8"))] == []
