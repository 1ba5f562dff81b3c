"""The study that measures the packaged model: every block once, nothing twice after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.studies.tinychat import Measurement, attacks, benign_blocks, harmful_blocks, summary
from lightning_modules.models.loading import ModelConfig, load_model

BASE = Path(__file__).resolve().parents[2] / "lightning_modules" / "models" / "tinychat" / "base"


@pytest.fixture
def untrained(tmp_path: Path) -> str:
    """A folder with a small untrained model of the packaged vocabulary and its tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((BASE / name).read_bytes())
    config = ModelConfig(str(BASE), from_scratch=True, config={"num_hidden_layers": 1, "hidden_size": 16})
    load_model(config).save_pretrained(folder)
    return str(folder)


def test_a_killed_measurement_goes_on_where_it_stood(untrained: str, tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    Measurement(untrained, "validation", path, limit=4, attacked=4).run(["prefilling"])
    lines = path.read_text().splitlines()
    names = {json.loads(line)["name"] for line in lines}
    blocks = {*harmful_blocks("validation", 4), *benign_blocks("validation", 4)}
    assert names == {*blocks, "attack/prefilling/0"}
    path.write_text("\n".join(lines[:5]) + "\n")
    Measurement(untrained, "validation", path, limit=4, attacked=4).run(["prefilling"])
    again = path.read_text().splitlines()
    assert sorted(again) == sorted(lines)
    assert again[:5] == lines[:5]
    prefilled = json.loads(lines[-1])
    assert prefilled["n"] == 4 and "success" in summary(prefilled)


def test_the_stated_attacks_are_measured() -> None:
    assert list(attacks()) == ["prefilling", "soft_prompt", "embedding", "gcg"]
