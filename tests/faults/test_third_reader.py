"""What a third reader found, who had the issue's text and the repository: each of these failed before."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import WandbLogger

from callbacks.run_folder.loggers import RunCSVLogger
from datamodules.evaluation import EvaluationData, EvaluationSets
from datamodules.fields import constructor
from datamodules.sources.tinychat.sources import TinyChatHarmful
from datamodules.text.encoding import EncodingConfig
from datamodules.text.tokenizers import TokenizerConfig
from experiments.commands.list import listing

Run = Callable[..., tuple[int, str, str]]


class Of:
    """As much of a trainer as the data asks for."""

    is_global_zero = True

    def __init__(self, rank: int, world_size: int) -> None:
        self.global_rank, self.world_size = rank, world_size


def prompts(rank: int, world_size: int, limit: int = 5) -> list[str]:
    """Keys of the prompts that a process of several predicts for."""
    sets = EvaluationSets([TinyChatHarmful("validation", limit=limit)])
    data = EvaluationData(TokenizerConfig("tinychat:aligned"), sets, EncodingConfig(160))
    trainer: Any = Of(rank, world_size)
    data.trainer = trainer
    data.setup("predict")
    return [key for loader in data.predict_dataloader() for batch in loader for key in batch.keys]


def test_every_process_predicts_its_own_share() -> None:
    shares = [prompts(rank, 2) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 2]
    assert sorted(shares[0] + shares[1]) == sorted(prompts(0, 1))


def test_fewer_prompts_than_processes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expected a prompt for each of 3 processes, got 2; set trainer\.devices: 2"
    ):
        prompts(0, 3, limit=2)


def test_a_model_that_cannot_be_loaded_leaves_nothing_to_agree_with(fit: Run, tmp_path: Path) -> None:
    status, _, err = fit("--model.base.name_or_path=no-such model")
    assert status == 1 and "no-such model" in err
    status, _, err = fit()
    assert status == 0, err


def test_what_a_logger_s_constructor_says_is_not_lost(fit: Run) -> None:
    logger = {
        "class_path": "callbacks.run_folder.loggers.ResilientWandbLogger",
        "init_args": {"save_dir": "/proc/nope"},
    }
    status, _, err = fit(f"--trainer.logger={json.dumps([logger])}")
    assert status == 2
    assert err.endswith("thundercat: Logger: [Errno 2] No such file or directory: '/proc/nope'\n")


def test_annotations_for_type_checkers_alone_are_no_error() -> None:
    assert "offline" in constructor(WandbLogger)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected model and data"),
        (b"a: [", "config.yaml"),
        (b"model: {init_args: {base: x}}", "expected model and data, got no data"),
        (b"\xff\xfe", "config.yaml"),
    ],
)
def test_chat_names_the_file_that_is_no_configuration(
    thundercat: Run, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    status, _, err = thundercat("chat", str(tmp_path))
    assert status == 2
    assert message in err and str(tmp_path) in err and err.count("\n") == 1
    assert "unexpected" not in err


def test_bytes_that_are_no_text_do_not_end_a_conversation(
    fit: Run, thundercat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit()[0] == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\nAdd 1 and 2.\n"), encoding="utf-8"))
    status, out, err = thundercat("chat", str(tmp_path / "run"), "--max_new_tokens=4")
    assert status == 0, err
    assert "expected text, got bytes that are none" in err
    assert len(out.strip().splitlines()) == 2


def test_a_log_of_a_configuration_alone_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "hparams.yaml").write_text("a: 1")
    assert Path(RunCSVLogger(str(tmp_path)).log_dir).name == "csv_2"


def test_help_gives_the_fields_of_settings_once(thundercat: Run) -> None:
    status, out, _ = thundercat("fit", "--help")
    assert status == 0
    assert out.count("schedule.every_n_steps (") == 1


def test_only_sources_are_listed_as_sources() -> None:
    names = [line.split()[0] for line in listing("sources").splitlines()]
    assert any(name.endswith("harmbench.HarmBench") for name in names)
    assert not [name for name in names if name.endswith((".Source", ".Task", ".QuestionFile"))]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--model.base.name_or_path=organism:aligned",
            "organism:aligned moved to tinychat:aligned; write that",
        ),
        ("--data=datamodules.behaviours.BehaviourData", "datamodules.behaviours.BehaviourData moved to"),
    ],
)
def test_old_names_say_where_they_are_now(
    thundercat: Run, tmp_path: Path, override: str, message: str
) -> None:
    folder = f"--trainer.default_root_dir={tmp_path}"
    status, _, err = thundercat("fit", "--config", "configs/experiment/cat_tinychat.yaml", folder, override)
    assert status != 0
    assert message in err
