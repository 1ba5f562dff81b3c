"""The README's paths exist, its commands parse, and its tree names every Python file of the packages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from experiments.cli import split_arguments
from experiments.config.check import check
from experiments.config.compose import compose
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("thundercat ")]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str, in_root: Path) -> None:
    _, name, *rest = shlex.split(command)
    if name == "report":
        return
    files, overrides, flags = split_arguments(rest)
    # A run folder's own config exists only after the run; it has the same fields as the file it was made
    # from.
    files = ["configs/quickstart.yaml" if file.startswith("runs/") else file for file in files]
    texts = {"prompt", "target"} if name == "attack" else set()
    check(compose(files, [(key, value) for key, value in overrides if key not in texts]), name)
    assert set(flags) <= {"--print_config", "--help"}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"quickstart", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_main_path_is_short() -> None:
    section = README[README.index("## The main path") : README.index("```\nconfigs/")]
    assert len(re.findall(r"\]\(", section)) <= 6


def test_no_machine_paths_in_the_project() -> None:
    suffixes = {".py", ".md", ".yaml", ".cfg", ".toml", ".json", ".jinja", ".txt", ".cff"}
    private = re.compile("/(?:work|root|home|tmp)/" + r"\w+")
    folders = ["callbacks", "configs", "datamodules", "experiments", "lightning_modules"]
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes] + list(
        ROOT.glob("*.*")
    )
    assert not [
        str(p)
        for p in files
        if p.is_file() and p.suffix in suffixes and private.search(p.read_text(encoding="utf-8"))
    ]
