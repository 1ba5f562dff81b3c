"""The JSON schema for editors: every file of ours fits it, and what is wrong does not."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from experiments.commands.schema import schema
from experiments.config.files import read
from tests.conftest import ROOT

# What judges are measured on, a study of several runs and a sweep are no configuration of a run.
OTHERS = ("judges", "study", "sweep")
FILES = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name not in OTHERS]


@pytest.fixture(scope="module")
def validator() -> Any:
    found = schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_fits(path: Any, validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(read(path))] == []


GCG = "lightning_modules.attacks.suffix.gcg.GCG"


@pytest.mark.parametrize(
    "wrong",
    [
        {"modell": {}},
        {"trainer": {"max_step": 1}},
        {"trainer": {"max_steps": -5}},
        {"model": {"class_path": "a.B", "init_arg": {}}},
        {"class_path": GCG, "init_args": {"widht": 1}},
        {"class_path": GCG, "init_args": {"width": "many"}},
        {"model": {"class_path": "callbacks.health.AttackHealth", "init_args": {"x": 1}}},
        {"seed_everything": -1},
    ],
)
def test_what_is_wrong_does_not_fit(wrong: Any, validator: Any) -> None:
    assert list(validator.iter_errors(wrong))


@pytest.mark.parametrize(
    "right",
    [
        {"class_path": GCG, "init_args": {"width": "${vars.width}"}},
        {"class_path": "my_package.Own", "init_args": {"anything": 1}},
        {"include": ["a.yaml", {"file": "b.yaml", "at": "model.init_args.attack"}], "vars": {"a": 1}},
        {"model": {"init_args": {"attack": {"include": "gcg.yaml", "init_args": {"width": 4}}}}},
    ],
)
def test_parts_interpolations_and_own_classes_fit(right: Any, validator: Any) -> None:
    assert not list(validator.iter_errors(right))
