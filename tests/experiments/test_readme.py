"""What the READMEs say holds: links lead somewhere, commands and files are accepted, the Python lines run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.support.readme import READMES, blocks, commands, own_files

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDED = ROOT / "experiments" / "results" / "quickstart_cpu_202611"
Run = Callable[..., tuple[int, str, str]]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


CALLS = [
    pytest.param(path, call, id=f"{name(path)}: {call}")
    for path in READMES
    for call in commands(path, "thundercat")
]
MODULES = [
    pytest.param(module, id=f"{name(path)}: {module}")
    for path in READMES
    for module in sorted(set(re.findall(r"python -m ([\w.]+)", path.read_text(encoding="utf-8"))))
]
LINKS = [
    pytest.param(path.parent / target, id=f"{name(path)}: {target}")
    for path in [*READMES, ROOT / "experiments" / "FINDINGS.md"]
    for target in sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8"))))
]


@pytest.mark.parametrize("target", LINKS)
def test_links_lead_somewhere(target: Path) -> None:
    assert target.exists()


def unplanned(*_: object, **__: object) -> None:
    """What runs cost is asked of studies elsewhere."""
    raise ValueError("not planned")


@pytest.mark.parametrize(("path", "call"), CALLS)
def test_commands_are_accepted(
    path: Path, call: str, thundercat: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everything before a model is loaded, beside the files that the README shows."""
    for file, text in own_files(path).items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    _, command, *rest = shlex.split(call)
    if command in ("chat", "export", "compare"):
        rest.append("--help")
    if command in ("study", "sweep"):
        rest.append("--dry_run")
        monkeypatch.setattr("experiments.commands.plan.executed", unplanned)
    if command == "report":
        # Of the recorded quickstart, which has a run's own files.
        for folder in rest:
            shutil.copytree(RECORDED, folder)
    # A run folder's own configuration exists only after the run; it has the same fields as the file it was
    # made from.
    rest = [re.sub(r"^((?:--config=)?)runs/.*\.yaml$", r"\1configs/quickstart.yaml", word) for word in rest]
    if command in ("fit", "validate", "test", "predict", "attack", "plan") and "--help" not in rest:
        rest.append("--print_config")
    status, out, err = thundercat(command, *rest)
    wanted_error = next(
        (line for line in path.read_text().splitlines() if line.startswith("thundercat: ")), ""
    )
    if status:
        # A README may show an error; then it must be this one.
        assert wanted_error and err.startswith(wanted_error.partition(";")[0]), err
    else:
        assert out


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_are_run_exist(module: str) -> None:
    assert importlib.util.find_spec(module.rstrip(".")) is not None


@pytest.mark.parametrize("path", READMES, ids=name)
def test_yaml_blocks_are_yaml(path: Path) -> None:
    for block in blocks(path):
        if block.language == "yaml":
            assert yaml.safe_load(block.text) is not None


@pytest.mark.parametrize("path", [p for p in READMES if "experiments.api" in p.read_text()], ids=name)
def test_python_blocks_run(path: Path, in_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(path):
        if block.language == "python" and "experiments.api" in block.text:
            exec(compile(block.text, str(path), "exec"), {})
            assert capsys.readouterr().out.strip()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE))
    assert {"quickstart", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_main_paths_are_short() -> None:
    """One training example and one evaluation example: at most six files each."""
    section = README[
        README.index("## The main path") : README.index("[configs/](configs/README.md) YAML only")
    ]
    training, evaluation = section.split("One **evaluation** example")
    assert 1 <= len(re.findall(r"\]\(", training)) <= 6
    assert 1 <= len(re.findall(r"\]\(", evaluation)) <= 6
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("folder", ["datamodules", "lightning_modules", "callbacks", "experiments"])
def test_a_folder_s_readme_names_every_file(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    files = [path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    assert not [path.name for path in files if path.name not in text]


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
