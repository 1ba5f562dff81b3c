"""SmoothLLM's assumption measured on recorded suffixes, and on a model whose suffixes are k-unstable by
construction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from callbacks.judges.exact import TargetPrefix
from datamodules.result_lines import Stage
from datamodules.results import ResultsStore, read_rows
from experiments.config.errors import ConfigError
from experiments.instability import _worked, main, measure
from lightning_modules.defences.certificates.k_instability import Instability, instability
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Request
from tests.conftest import ROOT, tiny_model, tinychat_format

RECORDED = ROOT / "experiments" / "results" / "quickstart_cpu_202611"


def test_a_suffix_that_dies_of_three_changes_is_found_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model, suffix = LanguageModel(tiny_model(), chat=tinychat_format()), "x" * 12

    def reply(self: LanguageModel, asked: Sequence[Request], _: object) -> list[str]:
        assert all(own.text.startswith("How? ") for own in asked)
        changed = [sum(a != b for a, b in zip(own.text[5:], suffix, strict=False)) for own in asked]
        return ["Yes, so." if k < 3 else "No." for k in changed]

    monkeypatch.setattr(LanguageModel, "reply", reply)
    requests, targets = [Request(f"How? {suffix}"), Request("How? xy")], ["Yes, so.", "Yes, so."]
    found = instability(model, requests, targets, [12, 2], TargetPrefix(), [1, 2, 3, 5], draws=7)
    # The suffix of two characters has no three that could change.
    assert found == [
        Instability(1, 14, 14),
        Instability(2, 14, 14),
        Instability(3, 0, 7),
        Instability(5, 0, 7),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    shutil.copytree(RECORDED, folder)
    return folder


def test_recorded_suffixes_on_the_packaged_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "instability.json"
    words = ["--stage=fit", "--ckpt_path=null", "--limit=6", "--draws=3", "--ks=[1,12]", f"--out={out}"]
    found = main([str(run), *words])
    assert found[1].n == found[12].n == 18
    assert found[1].value > 0.5 > found[12].value
    assert "6 suffixes of 'gcg'" in capsys.readouterr().out
    cells = json.loads(out.read_text())["cells"]
    assert [cell["works"]["value"] for cell in cells] == [found[1].value, found[12].value]
    assert cells[0]["promised"] > 0.99 > 0.01 > cells[1]["promised"]


@pytest.mark.parametrize(
    ("attack", "stage", "step"),
    [
        ("embedding", "fit", 0),  # nothing typed
        ("prefilling", "fit", 0),  # no suffix
        ("gcgg", "fit", 0),
        ("gcg", "validate", 0),  # nothing measured
    ],
)
def test_what_has_no_suffix_that_worked_is_refused(run: Path, attack: str, stage: Stage, step: int) -> None:
    with pytest.raises(ConfigError, match=f"model of step {step} .*found none of '{attack}'"):
        measure(str(run), attack, stage, None)


def test_suffixes_of_other_models_and_behind_defences_are_left_out(run: Path, tmp_path: Path) -> None:
    """Rows of the trained model stand in the same folder; a defence's could."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    rows = [
        row for row in read_rows(run) if (row.attack, row.stage, row.subject) == ("gcg", "fit", "harmful")
    ]
    assert {row.step for row in rows} == {0, 100}
    guarded = [replace(row, defence="smooth-1", settings="x") for row in rows if row.step == 0]
    ResultsStore(folder).add(guarded)
    (model,) = {row.model for row in rows if row.step == 0}
    found = _worked(folder, "gcg", "fit", 0, model)
    assert 10 <= len(found) <= 16
    assert {(row.step, row.model, row.defence) for row in found} == {(0, model, "")}
    assert not _worked(folder, "gcg", "fit", 0, "another")
