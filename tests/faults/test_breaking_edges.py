"""Edges at which a hostile reader broke the rebuilt trunk: YAML that means something else than it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from callbacks.run_folder.folder import RunFolder
from callbacks.run_folder.provenance import Provenance
from datamodules.fields import Fraction, describe
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from experiments.config.check import check_value
from experiments.config.errors import ConfigError
from experiments.config.files import parse, read

Run = Callable[..., tuple[int, str, str]]
TINYCHAT = "configs/experiment/cat_tinychat.yaml"


@pytest.mark.parametrize("text", ["1:30", "010", "1:30.5", "0b11"])
def test_a_number_of_yaml_1_1_is_no_number(text: str) -> None:
    """`epsilon: 1:30` was 90, `max_steps: 010` was 8."""
    assert parse("model.attack.epsilon", text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-3", -3),
        ("1_000", 1000),
        ("0x10", 16),
        ("1e-4", 1e-4),
        ("0.5", 0.5),
        (".inf", float("inf")),
    ],
)
def test_numbers_are_still_numbers(text: str, value: float) -> None:
    found = parse("key", text)
    assert found == value and type(found) is type(value)


def test_an_alias_inside_what_it_names_is_an_error(tmp_path: Path) -> None:
    """It kept the interpolation busy for minutes and ended in a message of 30,000 characters."""
    with pytest.raises(ConfigError, match="model.attack.epsilon: an alias"):
        parse("model.attack.epsilon", "&a [*a]")
    path = tmp_path / "loop.yaml"
    path.write_text("trainer: &t {callbacks: [*t]}")
    with pytest.raises(ConfigError, match=r"loop.yaml: an alias"):
        read(path)


def test_aliases_of_aliases_are_counted(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        read(path)


@pytest.mark.parametrize("text", ["a: " + "[" * 100_000, "a: " + "{b: " * 5_000])
def test_a_file_nested_without_end_is_one_line(text: str, tmp_path: Path) -> None:
    """A faster parser ends the process here."""
    path = tmp_path / "deep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"deep\.yaml: nested too deeply"):
        read(path)


def test_what_is_read_twice_is_not_shared(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: {b: [1]}")
    read(path)["a"]["b"].append(2)
    assert read(path) == {"a": {"b": [1]}}
    path.write_text("a: {b: [3]}")
    assert read(path) == {"a": {"b": [3]}}


def test_an_alias_used_twice_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(yaml.safe_dump({"one": (shared := {"x": 1}), "two": shared}))
    assert "&" in path.read_text() and read(path) == {"one": {"x": 1}, "two": {"x": 1}}


def test_a_pair_is_described_in_words() -> None:
    assert (
        describe(tuple[Fraction, Fraction]) == "a list of 2: a number within [0, 1), a number within [0, 1)"
    )


def test_an_empty_mapping_is_named_without_a_dangling_dot() -> None:
    with pytest.raises(ConfigError, match=r"^model\.seed: expected"):
        check_value("model.seed", {}, int)


@pytest.mark.parametrize("revision", ["12e4567", "1e-4", "010", "1:30", ".5e1", "0x10", "1_000", "1."])
def test_a_text_that_looks_like_a_number_comes_back_as_text(tmp_path: Path, revision: str) -> None:
    """config.yaml of a run is what `thundercat test --config` reads."""
    folder = RunFolder.of(str(tmp_path))
    Provenance({"revision": revision, "lr": 1e-5, "steps": 8}).write(folder, "fit")
    assert read(folder.config("fit")) == {"revision": revision, "lr": 1e-5, "steps": 8}


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^tokenizer.name_or_path: cannot load a tokenizer from '.*nothing'"
    ):
        load_tokenizer(TokenizerConfig(str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--model.attack=callbacks.judges.exact.TargetPrefix",
            "model.attack.class_path: expected a kind of Attack",
        ),
        ("--model.objective=NoAttack", "model.objective.class_path: expected a kind of Objective"),
        ("--trainer.max_steps=0", "trainer.max_steps: expected some training, got 0"),
        ("--trainer.limit_train_batches=0", "trainer.limit_train_batches: expected some training, got 0"),
    ],
)
def test_what_cannot_work_is_refused_by_its_field(override: str, message: str, thundercat: Run) -> None:
    status, _, err = thundercat("fit", "--config", TINYCHAT, override, "--print_config")
    assert status == 2
    assert message in err


def test_beginning_anew_and_going_on_exclude_each_other(thundercat: Run, tmp_path: Path) -> None:
    own = ("--overwrite", "--ckpt_path=last", f"--trainer.default_root_dir={tmp_path}")
    status, _, err = thundercat("fit", "--config", TINYCHAT, *own)
    assert status != 0
    assert "--overwrite: begins a new run" in err
