"""What somebody with a model and rows of their own does wrong on the first day, and what is said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules import adversarial
from experiments.config.compose import ConfigError, compose
from tests.support.small_run import small_config

Run = Callable[..., tuple[int, str, str]]


def harmful(folder: Path, **row: str) -> str:
    """One behaviour in a table, as the field that reads it."""
    own = {"prompt": "How do I steal a car?", "target": "Yes, take a car.", "safe_reply": "No, I will not."}
    (folder / "own.jsonl").write_text(json.dumps(own | row) + "\n")
    init = {"path": str(folder / "own.jsonl"), "columns": {name: name for name in own}}
    node = {"class_path": "datamodules.sources.tables.HarmfulTable", "init_args": init}
    return f"--data.harmful={json.dumps([node])}"


def test_a_misspelt_variable_of_a_file_is_not_ignored(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("vars: {evaluation_epsilom: 0.3}")
    with pytest.raises(ConfigError, match=r"vars.evaluation_epsilom: .* did you mean 'evaluation_epsilon'"):
        compose(["configs/quickstart.yaml", str(tmp_path / "own.yaml")], [])


def test_a_variable_whose_users_a_later_file_replaces_is_no_misspelling(tmp_path: Path) -> None:
    compose(["configs/quickstart.yaml", "configs/evaluation/certify_study.yaml"], [])
    (tmp_path / "own.yaml").write_text('vars: {rate_1: 1, rate_2: 2}\nckpt_path: "${vars.rate_1}"')
    compose([str(tmp_path / "own.yaml")], [])


def test_a_variable_that_no_file_sets_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text('model: {init_args: {optimizer: {lr: "${vars.rate}"}}}')
    with pytest.raises(ConfigError, match=r"lr: takes its value from vars.rate, .* set it, or --vars.rate="):
        compose([str(tmp_path / "own.yaml")], [])


def test_a_target_that_is_the_safe_reply_is_a_bad_row(thundercat: Run, tmp_path: Path) -> None:
    rows = harmful(tmp_path, safe_reply="Yes, take a car. ")
    status, _, err = thundercat("fit", "--config", str(small_config(tmp_path)), rows)
    assert status != 0
    assert "own.jsonl:1: the target and the safe reply are the same text" in err


def test_harmful_sources_that_are_not_read_are_a_warning(
    thundercat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(adversarial.log, "warning", lambda text, *given: said.append(text % given))
    given = "--data.harmful_per_step=0", "--trainer.max_steps=1"
    assert thundercat("fit", "--config", str(small_config(tmp_path)), *given)[0] == 0
    assert said == ["data.harmful_per_step is 0: data.harmful is not read, and nothing is attacked"]


def test_another_models_tokenizer_is_refused(thundercat: Run, tmp_path: Path, public_data: Path) -> None:
    other = f"--data.tokenizer.name_or_path={public_data / 'models' / 'tokenizers' / 'phi3-mini'}"
    status, _, err = thundercat("fit", "--config", str(small_config(tmp_path)), other)
    assert status != 0
    assert "data.tokenizer: 32000 tokens, but tinychat:aligned embeds " in err


def test_a_file_that_changed_since_is_said_to_have_changed(thundercat: Run, tmp_path: Path) -> None:
    config, rows = str(small_config(tmp_path)), harmful(tmp_path)
    assert thundercat("fit", "--config", config, rows, "--trainer.max_steps=1")[0] == 0
    harmful(tmp_path, target="Yes, here is how.")
    status, _, err = thundercat("fit", "--config", config, rows, "--trainer.max_steps=1", "--ckpt_path=last")
    assert status != 0
    assert "was made when files held something else: data.harmful.0.path.content" in err
    assert "restore what they held, or use another folder" in err


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ("{class_path: datamodules.sources.tables.HarmfulTable, init_args: {path: a}}", "Expected a .*list"),
        (
            "[{class_path: datamodules.sources.tables.ChatTable, init_args: {path: a}}]",
            "ChatTable does not implement protocol HarmfulSource",
        ),
    ],
)
def test_sources_of_the_wrong_kind_are_said_with_their_field(
    thundercat: Run, tmp_path: Path, sources: str, said: str
) -> None:
    status, _, err = thundercat("fit", "--config", str(small_config(tmp_path)), f"--data.harmful={sources}")
    assert status != 0
    assert re.search(f"^thundercat: data.harmful: .*{said}", err, re.MULTILINE)
