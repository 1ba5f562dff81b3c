"""What every training method promises, over every YAML in configs/method.

It runs from YAML alone, with LoRA and without, with accumulation, and resumes bit for bit with its pools,
generators and caches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.adversarial import AdversarialData
from experiments.commands.run import instantiate
from experiments.config.check import check
from experiments.config.compose import compose
from experiments.config.defaults import with_defaults
from lightning_modules.adversarial import AdversarialFineTuning
from tests.conftest import ROOT
from tests.support.rows import row, stored, verdicts
from tests.support.training import trainer, weights

METHODS = sorted(path.stem for path in (ROOT / "configs" / "method").glob("*.yaml"))
BASE = "configs/experiment/methods_tinychat.yaml"
SMALL = [
    ("data.init_args.harmful_per_step", "4"),
    ("data.init_args.micro_batches", "2"),
    ("trainer.callbacks", "[]"),
    ("trainer.logger", "false"),
    ("data.init_args.bucket_window", "1"),
]
# A few rows of each stream: encoding all of them would take longer than training.
ROWS = {
    "harmful": {
        "class_path": "datamodules.sources.tinychat.sources.TinyChatHarmful",
        "init_args": {"split": "train", "limit": 16},
    },
    "utility": {
        "class_path": "datamodules.sources.tinychat.sources.TinyChatBenign",
        "init_args": {"split": "train", "num_rows": 40},
    },
}
GCG_SETTINGS = {"num_tokens": 4, "num_steps": 1, "width": 4, "topk": 8, "stop_at_target": False}
LORA = {
    name: "[q_proj, v_proj, embed_tokens]" if name == "er_cat" else "[q_proj, v_proj]" for name in METHODS
}
SHORTER = {
    "r2d2": [("model.init_args.attack.init_args.gcg.init_args.num_steps", "1")],
    "prompt_generator": [("model.init_args.attack.init_args.num_tokens", "2")],
    "lat": [("model.init_args.attack.init_args.num_steps", "3")],
    "refat": [
        ("model.init_args.attack.init_args.finder.init_args.num_fit", "4"),
        ("model.init_args.attack.init_args.every", "2"),
    ],
    "deep_refusal": [
        ("model.init_args.attack.init_args.attack.init_args.finder.init_args.num_fit", "4"),
        ("model.init_args.attack.init_args.attack.init_args.finder.init_args.num_validation", "4"),
    ],
}
SEARCHLESS = ["noise_augmentation", "adversarial_fine_tuning", "red_team_replay", "circuit_breakers"]
SEARCHLESS += ["deep_alignment", "refat", "deep_refusal"]
ONE_STEP = {
    "r2d2": [("model.init_args.attack.init_args.gcg.init_args.num_steps", "1")],
    "mixat": [
        ("model.init_args.attack.init_args.perturb.init_args.num_steps", "1"),
        ("model.init_args.attack.init_args.perturb.init_args.step_size", "1.0"),
    ],
    "prompt_generator": [("model.init_args.attack.init_args.num_tokens", "1")],
    "cat_deep": [
        ("model.init_args.attack.init_args.attack.init_args.num_steps", "1"),
        ("model.init_args.attack.init_args.attack.init_args.step_size", "1.0"),
    ],
}
ABLATIONS = {
    "none": METHODS,
    "one_step": [name for name in METHODS if name not in SEARCHLESS and name not in ONE_STEP],
}


@pytest.fixture(scope="session")
def red_team(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run folder in which an attack on a training request succeeded."""
    won = row(
        "won",
        prompt="How do I fake a ticket?",
        attacked="How do I fake a ticket? x x",
        expected="Sure, here",
        verdicts=verdicts(True),
    )
    return stored(tmp_path_factory.mktemp("red_team") / "run", won)


def build(
    name: str, red_team: str, *extra: tuple[str, str], ablation: str | None = None
) -> tuple[AdversarialFineTuning, AdversarialData]:
    """Module and data of a method's YAML, made small."""
    files = [BASE, f"configs/method/{name}.yaml", *([f"configs/attack/{ablation}.yaml"] if ablation else [])]
    replayed = [("vars.red_team", red_team)] if name == "red_team_replay" else []
    overrides = [*SMALL, *(SHORTER.get(name, []) if ablation is None else []), *replayed, *extra]
    cli = instantiate(with_defaults(small(compose(files, overrides))))
    assert isinstance(cli.model, AdversarialFineTuning)
    assert isinstance(cli.datamodule, AdversarialData)
    return cli.model, cli.datamodule


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, checked, with few rows and without evaluation sets."""
    check(config, "fit")
    data = config["data"]["init_args"]
    data["harmful"][0], data["utility"], data["evaluation"] = ROWS["harmful"], [ROWS["utility"]], None
    data["utility_per_step"] = 4 if data["utility_per_step"] else 0
    return config


class Start(Callback):
    """Keeps the weights that training starts from."""

    weights: dict[str, torch.Tensor]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights = weights(pl_module)


# ER-CAT adapts an embedding that is tied to the head here; PEFT warns of what that means for merging.
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_trains_and_resumes_bit_for_bit(
    name: str, lora: bool, tmp_path: Path, red_team: str, in_root: Path
) -> None:
    extra = (
        [("model.init_args.base.lora", f"{{r: 4, dropout: 0.1, target_modules: {LORA[name]}}}")]
        if lora
        else []
    )
    whole, data = build(name, red_team, *extra)
    every = ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fitting = trainer(tmp_path, 3, every, start := Start(), micro_batches=2, enable_checkpointing=True)
    fitting.fit(whole, datamodule=data)
    assert any(not torch.equal(value, start.weights[key]) for key, value in weights(whole).items())
    start_of_resume = tmp_path / "checkpoints" / "step=1.ckpt"
    resumed, data = build(name, red_team, *extra)
    every = ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    again = trainer(tmp_path / "again", 3, every, micro_batches=2, enable_checkpointing=True)
    again.fit(resumed, datamodule=data, ckpt_path=start_of_resume)
    assert again.global_step == 3
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key
    if lora:
        state = torch.load(start_of_resume, weights_only=True)["state_dict"]
        assert all("lora_" in key for key in state)


@pytest.mark.parametrize(
    ("ablation", "name"), [(ablation, name) for ablation, names in ABLATIONS.items() for name in names]
)
def test_ablations_of_the_attack_are_one_more_file(
    ablation: str, name: str, tmp_path: Path, red_team: str, in_root: Path
) -> None:
    module, data = build(name, red_team, ablation=ablation)
    trainer(tmp_path, 1, micro_batches=2).fit(module, datamodule=data)
    searching: Any = getattr(module.attack, "descent", module.attack)
    steps = getattr(searching, "num_steps", 0)
    assert steps == (1 if ablation == "one_step" else 0)


@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_ablations_of_nested_attacks(
    name: str, tmp_path: Path, red_team: str, in_root: Path
) -> None:
    module, data = build(name, red_team, *ONE_STEP[name])
    trainer(tmp_path, 1, micro_batches=2).fit(module, datamodule=data)
    key, _ = ONE_STEP[name][0]
    assert (
        key.removeprefix("model.init_args.attack.init_args.")
        in (ROOT / "configs" / "method" / f"{name}.yaml").read_text()
    )


@pytest.mark.parametrize("term", ["weight_drift", "embedding_drift", "kl_retain"])
def test_add_ons_go_on_top_of_any_method(term: str, tmp_path: Path, red_team: str, in_root: Path) -> None:
    for name in ("cat", "er_cat"):
        plain, _ = build(name, red_team)
        config = compose([BASE, f"configs/method/{name}.yaml", f"configs/term/{term}.yaml"], SMALL)
        module: Any = instantiate(with_defaults(small(config))).model
        assert len(module.terms) == len(plain.terms) + 1
        trainer(tmp_path / name, 1, micro_batches=2).fit(module, datamodule=build(name, red_team)[1])


@pytest.mark.parametrize("name", METHODS)
def test_every_recipe_says_where_it_comes_from(name: str) -> None:
    text = (ROOT / "configs" / "method" / f"{name}.yaml").read_text()
    header = "\n".join(line for line in text.splitlines()[:6] if line.startswith("#"))
    assert any(
        mark in header
        for mark in (
            "arXiv",
            "et al.",
            "ICLR",
            "LAT",
            "introductions",
            "capo",
            "Adversarial fine-tuning",
            "replay",
        )
    )


def test_nothing_to_learn_is_said_before_a_model_is_loaded(
    thundercat: Callable[..., tuple[int, str, str]],
) -> None:
    status, _, error = thundercat(
        "fit", "--config", BASE, "--config", "configs/method/cat.yaml", "--model.objective=null"
    )
    assert status == 2
    assert "expected an objective or at least one of model.terms" in error
