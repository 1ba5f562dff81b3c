"""What a hostile reader found in the finished trunk: each of these failed before."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from lightning import Callback

from callbacks.run_folder.checkpoint_files import digest, read_checkpoint
from callbacks.run_folder.checkpoints import find_checkpoint
from callbacks.run_folder.decisive import decisive
from callbacks.run_folder.folder import RunError
from experiments import cli
from experiments.commands.run import _Printable
from experiments.config.seeds import with_seeds
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.models.language_model import LanguageModel
from tests.support.small_run import evaluated, small_config

Run = Callable[..., tuple[int, str, str]]
HERE = "tests.faults.test_hostile"
EVALUATED = evaluated(2)


class Mine(AdversarialFineTuning):
    """A user's module that hands on what it does not name."""

    def __init__(self, extra: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = extra


class Keeps(Callback):
    """A user's callback with a state."""

    def __init__(self, kind: str = "set") -> None:
        self.kind = kind

    def state_dict(self) -> dict[str, Any]:
        kinds = {"set": {"b", "a", "c"}, "number": numpy.float64(1.0), "path": Path("a")}
        return {"seen": kinds[self.kind]}


class Returns(AdversarialFineTuning):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return torch.ones(2)


def callbacks(folder: Path, *more: dict[str, Any]) -> str:
    """The small run's callbacks and further ones, as one field."""
    config = yaml.safe_load(small_config(folder).read_text())
    return f"--trainer.callbacks={json.dumps([*config['trainer']['callbacks'], *more])}"


def test_what_a_constructor_hands_on_decides_the_weights_too(fit: Run, tmp_path: Path) -> None:
    own = f"--model.class_path={HERE}.Mine"
    assert fit(own)[0] == 0
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["seeds"]["model.seed"] == 0
    status, _, err = fit(own, "--ckpt_path=last", "--trainer.max_steps=5", "--model.optimizer.lr=0.5")
    assert status != 0
    assert "model.optimizer.lr: 0.001 then, 0.5 now" in err


def test_a_seed_behind_kwargs_is_filled() -> None:
    node = {"class_path": f"{HERE}.Mine", "init_args": {}}
    assert with_seeds({"seed_everything": 7, "model": node})["model"]["init_args"]["seed"] == 7
    assert decisive({"model": {**node, "init_args": {"odd": 3}}})["model.odd"] == 3


def test_an_order_of_a_set_is_no_damage(fit: Run, tmp_path: Path) -> None:
    kept = callbacks(tmp_path, {"class_path": f"{HERE}.Keeps"})
    assert fit(kept)[0] == 0
    status, _, err = fit(kept, "--ckpt_path=last", "--trainer.max_steps=4")
    assert status == 0, err
    assert "damaged" not in err
    texts = [str(i) for i in range(50)]
    assert digest({"a": set(texts)}) == digest({"a": {*texts[25:], *texts[:25]}})
    assert digest({"a": set(texts)}) != digest({"a": set(texts[1:])})


@pytest.mark.parametrize(("kind", "name"), [("number", "float64"), ("path", "PosixPath")])
def test_what_could_not_be_read_again_is_refused_at_once(
    fit: Run, tmp_path: Path, kind: str, name: str
) -> None:
    keeps = {"class_path": f"{HERE}.Keeps", "init_args": {"kind": kind}}
    status, _, err = fit(callbacks(tmp_path, keeps))
    assert status == 1
    assert f"callbacks.Keeps.seen holds a {name}" in err and "keep numbers, texts, tensors" in err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_within_a_folder_is_not_that_folder_s(
    fit: Run, thundercat: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit(f"--trainer.default_root_dir={tmp_path / 'parent' / 'sub'}")[0] == 0
    parent = f"--trainer.default_root_dir={tmp_path / 'parent'}"
    config = str(tmp_path / "small.yaml")
    status, _, err = thundercat("predict", "--config", config, parent, "--ckpt_path=last", EVALUATED)
    assert status != 0 and "no checkpoint in" in err
    status, _, err = fit(parent, "--ckpt_path=last")
    assert status == 0, err
    steps = sorted(path.name for path in (tmp_path / "parent" / "checkpoints").glob("*.ckpt"))
    assert steps == ["step_000002.ckpt", "step_000003.ckpt"]
    assert "training starts at step 0" in caplog.text


HALF = {"class_path": "lightning.pytorch.plugins.HalfPrecision", "init_args": {"precision": "bf16-true"}}
AVERAGING = {
    "class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging",
    "init_args": {"swa_lrs": 0.01},
}


def test_plugins_and_callbacks_that_change_weights_are_compared(fit: Run, tmp_path: Path) -> None:
    assert fit()[0] == 0
    changes = {
        "trainer.plugins.0.class_path": f"--trainer.plugins={json.dumps([HALF])}",
        "trainer.callbacks.StochasticWeightAveraging.": callbacks(tmp_path, AVERAGING),
    }
    for field, change in changes.items():
        status, _, err = fit("--ckpt_path=last", "--trainer.max_steps=5", change)
        assert status != 0
        assert field in err and "(unset) then" in err


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize("empty", ["--trainer.limit_predict_batches=0", "--data.evaluation=null"])
def test_predictions_of_nothing_are_an_error(fit: Run, thundercat: Run, tmp_path: Path, empty: str) -> None:
    assert fit(EVALUATED)[0] == 0
    words = ("predict", "--config", str(tmp_path / "run" / "config.yaml"))
    status, out, err = thundercat(*words, empty, "--ckpt_path=last")
    assert status != 0 and "predictions.jsonl" not in out
    assert "data.evaluation: found no prompt to predict for" in err


def test_a_predict_step_of_another_kind_is_named(fit: Run, thundercat: Run, tmp_path: Path) -> None:
    assert fit(EVALUATED)[0] == 0
    words = (
        "predict",
        "--config",
        str(tmp_path / "run" / "config.yaml"),
        f"--model.class_path={HERE}.Returns",
    )
    status, _, err = thundercat(*words)
    assert status == 1
    assert "expected predict_step of Returns to return a list of rows (mappings), got Tensor" in err


def test_a_reply_that_no_utf_8_file_can_hold_is_written(
    fit: Run, thundercat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(EVALUATED)[0] == 0
    monkeypatch.setattr(
        LanguageModel, "reply", lambda self, sent, *rest: ["half \ud83d"] * len(sent.prompt_ids)
    )
    status, _, err = thundercat("predict", "--config", str(tmp_path / "run" / "config.yaml"))
    assert status == 0, err
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["reply"] for line in lines} == {"half \ud83d"}


def test_a_file_named_by_a_number_is_asked_for_its_step(fit: Run, tmp_path: Path) -> None:
    assert fit()[0] == 0
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_000003.ckpt").rename(folder / "2.ckpt")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    found = find_checkpoint(tmp_path / "run", "last", "fit", config)
    assert found is not None and found.name == "2.ckpt"
    assert read_checkpoint(found)["global_step"] == 3


def test_lightning_s_timer_is_usable(fit: Run, tmp_path: Path) -> None:
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:01:00:00"}}
    status, _, err = fit(callbacks(tmp_path, timer))
    assert status == 0, err


def test_a_run_s_own_checkpoint_is_its_own_after_its_data_changed(
    fit: Run, thundercat: Run, tmp_path: Path
) -> None:
    rows = [{"goal": f"Tell me {i}", "target": "Sure"} for i in range(4)]
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"class_path": "datamodules.sources.tables.HarmfulTable", "init_args": {"path": str(path)}}
    assert fit(f"--data.harmful={json.dumps([source])}", EVALUATED)[0] == 0
    path.write_text(path.read_text().replace("Tell me 1", "Say 1"))
    words = ("predict", "--config", str(tmp_path / "run" / "config.yaml"))
    status, _, err = thundercat(*words, f"--ckpt_path={tmp_path / 'run/checkpoints/step_000003.ckpt'}")
    assert status == 0, err


def test_a_metric_that_nobody_logs_is_an_error(fit: Run, tmp_path: Path) -> None:
    watching = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"monitor": "train/los", "every_n_train_steps": 1},
    }
    status, _, err = fit(f"--trainer.callbacks={json.dumps([watching])}")
    assert status == 1
    assert "nothing has logged 'train/los', did you mean 'train/loss'?" in err


STOPPING = {
    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
    "init_args": {"monitor": "eval/harmful/refusal_rate", "mode": "max", "patience": 3, "strict": True},
}
REFUSALS = {
    "class_path": "callbacks.evaluations.refusal.RefusalEvaluation",
    "init_args": {"max_new_tokens": 4, "schedule": {"every_n_steps": 1, "at_start": True}},
}


def test_a_metric_that_is_no_longer_measured_is_not_monitored(fit: Run, tmp_path: Path) -> None:
    """Epochs of two steps: EarlyStopping asks after the fourth, one after the resume."""
    epochs = ("--trainer.limit_train_batches=2", "--trainer.max_epochs=-1")
    assert fit(EVALUATED, *epochs, callbacks(tmp_path, REFUSALS, STOPPING))[0] == 0
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "step_000003.ckpt")
    assert set(checkpoint["found"]) == {"refusal"}
    words = (*epochs, "--ckpt_path=last", "--trainer.max_steps=20")
    status, _, err = fit(EVALUATED, *words, callbacks(tmp_path, STOPPING))
    assert status == 1
    assert "conditioned on metric `eval/harmful/refusal_rate` which is not available" in err
    steps = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")]
    assert max(steps) == "step_000004.ckpt"


def test_the_short_step_of_an_epoch_s_end_is_kept_too(fit: Run, tmp_path: Path) -> None:
    """Three batches an epoch, two a step: Lightning steps on the last batch as well."""
    every = {
        "class_path": "callbacks.run_folder.checkpoints.RunCheckpoints",
        "init_args": {"keep": 9},
    }
    words = [
        "--trainer.limit_train_batches=3",
        "--trainer.accumulate_grad_batches=2",
        "--data.micro_batches=2",
    ]
    words += [
        "--trainer.max_epochs=2",
        "--trainer.max_steps=-1",
        f"--trainer.callbacks={json.dumps([every])}",
    ]
    status, _, err = fit(*words)
    assert status == 0, err
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert names == [f"step_{step:06d}.ckpt" for step in (1, 2, 3, 4)]


def test_names_of_files_cannot_act_on_the_terminal(
    fit: Run, thundercat: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "q\x1b[31mRED"
    assert fit(EVALUATED, f'--trainer.default_root_dir="{tmp_path}/q\\e[31mRED"')[0] == 0
    (folder / "checkpoints" / "step_000009.ckpt").write_text("damaged")
    status, out, err = thundercat("predict", "--config", str(folder / "config.yaml"), "--ckpt_path=last")
    assert status == 0, err
    assert "\x1b" not in out + err and "RED" in out
    assert "the one before it is taken" in caplog.text
    record = logging.LogRecord("n", logging.WARNING, "", 0, "%s", (folder,), None)
    assert "\x1b" not in _Printable("%(message)s").format(record)


def test_a_report_that_is_interrupted_has_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(words: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["report", "x"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "thundercat: stopped by SIGINT\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--trainer.min_steps=100", "trainer.min_steps: expected at most max_steps (3), got 100"),
        ("--trainer.accelerator=gpu", "trainer: No supported gpu backend found!"),
    ],
)
def test_the_trainer_s_own_errors_name_the_field(fit: Run, override: str, message: str) -> None:
    if "gpu" in override and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, _, err = fit(override)
    assert status == 2
    assert message in err and err.strip().count("\n") == 0


def test_attack_on_a_device_that_is_not_there(thundercat: Run, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = ["attack", "--prompt=a", "--target=b", "--trainer.accelerator=gpu"]
    words += ["--config", "configs/experiment/attack_tinychat.yaml", "--config", "configs/attack/gcg.yaml"]
    status, _, err = thundercat(*words, f"--trainer.default_root_dir={tmp_path}")
    assert status == 2 and "trainer: No supported gpu backend found!" in err


def test_a_folder_without_a_run_of_ours_names_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint in"):
        find_checkpoint(tmp_path, "last", "predict", {})
