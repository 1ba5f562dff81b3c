"""Every training method for two steps on a random model, in one process or as one of two; and what two
processes say that are about to do different things."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from callbacks.health import AttackHealth
from datamodules.batch import AdversarialBatch, TrainingBatch, UtilityBatch
from lightning_modules.adversarial import AdversarialFineTuning
from lightning_modules.attacks.base import AttackedPrompt, NoAttack
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.text.rewrites import Noise, Templates
from lightning_modules.attacks.training.mixture import Mixture
from lightning_modules.attacks.training.persistent_gcg import PersistentGCG
from lightning_modules.attacks.training.rewrite_then_perturb import RewriteThenPerturb
from lightning_modules.attacks.training.suffix_generator import SuffixGenerator
from lightning_modules.losses.base import LossTerms, Step, Term
from lightning_modules.losses.circuit_breakers import CircuitBreakers
from lightning_modules.losses.distributions import Distillation
from lightning_modules.losses.preference import Preference
from lightning_modules.losses.toward_away import TowardAwayUtility
from lightning_modules.losses.weights import SpectralSpread
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import LoraSettings, ModelConfig
from lightning_modules.models.sharding import ShardedWeights
from lightning_modules.sharded import FSDP2
from tests.conftest import SHAPE, ragged_batch, text_batch, tiny_model, tinychat_format, utility

STEPS = 2
Parts = Callable[[ModelConfig], dict[str, Any]]


def pgd(**settings: Any) -> EmbeddingPGD:
    return EmbeddingPGD(epsilon=0.3, num_steps=2, keep="last", **settings)


METHODS: dict[str, Parts] = {
    # Some rows leave the attack early, so that processes make different numbers of passes.
    "cat": lambda base: {
        "attack": pgd(random_start=True, stop_loss=8.3),
        "objective": TowardAwayUtility(),
    },
    "capo": lambda base: {"attack": pgd(), "objective": Preference()},
    "lat": lambda base: {
        "attack": LatentPGD([0, 1], True, 0.3, "embedding_norm", num_steps=2, keep="last", weight_safe=0.5),
        "objective": TowardAwayUtility(away_form="log1m", cutoff_away=None),
    },
    # Nothing above the compared layer has a gradient.
    "circuit_breakers": lambda base: {
        "attack": NoAttack(),
        "objective": None,
        "terms": [CircuitBreakers([0], horizon=2)],
    },
    "er_cat": lambda base: {
        "attack": pgd(),
        "objective": TowardAwayUtility(),
        "terms": [SpectralSpread()],
    },
    "distillation": lambda base: {"attack": pgd(), "objective": None, "terms": [Distillation()]},
    "r2d2": lambda base: {
        "attack": PersistentGCG(GCG(num_tokens=4, num_steps=1, width=8, topk=16, stop_at_target=False)),
        "objective": TowardAwayUtility(),
    },
    "mixat": lambda base: {
        "attack": RewriteThenPerturb(Templates("role_play"), pgd()),
        "objective": TowardAwayUtility(),
    },
    "prompt_generator": lambda base: {
        "attack": SuffixGenerator(base, num_tokens=2, candidates=3, beams=2, updates=1, lr=0.1),
        "objective": TowardAwayUtility(),
    },
    "noise_augmentation": lambda base: {
        "attack": Mixture([NoAttack(), Noise("character", num_samples=1), pgd()]),
        "objective": TowardAwayUtility(),
    },
}
LEARNS_ALL = ("er_cat", "distillation")
"""Methods that train all weights: the embedding must learn, or the reference is a copy."""


class _Seen(Callback):
    """Keeps the weights at the start, what is logged of every step, and what the attack spent on each of its
    examples."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.logged: list[dict[str, float]] = []
        self.passes: list[list[int]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.start = _whole(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: TrainingBatch, batch_idx: int
    ) -> None:
        logged = trainer.callback_metrics
        self.logged.append({k: float(v) for k, v in logged.items() if k.startswith("train/")})
        self.passes.append(outputs["attacked"].forward_passes.tolist())


class _NamesItsProcess:
    """A term that logs another name in each process, and is the same otherwise."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, step: Step) -> LossTerms:
        return replace(Distillation()(step), parts={f"of_{self.rank}": torch.zeros(())})


def trained(
    method: str,
    folder: Path,
    rank: int = 0,
    strategy: Any = "auto",
    harmful: bool = True,
    terms: list[Term] | None = None,
) -> dict[str, Any]:
    """The weights that learned, and what `_Seen` keeps. Without harmful rows nothing is attacked; terms stand
    in place of the method's."""
    world = 1 if strategy == "auto" else 2
    config = LlamaConfig(**{**SHAPE, "vocab_size": 2048, "max_position_embeddings": 512})
    # Wide enough that a reply's tokens are not all alike.
    config.initializer_range = 0.2
    path = folder / f"model_{method}_{type(strategy).__name__}_{rank}"
    config.save_pretrained(path)
    base = ModelConfig(str(path), from_scratch=True)
    lora = (
        None if method in LEARNS_ALL else LoraSettings(r=2, dropout=0.0, target_modules=["q_proj", "v_proj"])
    )
    parts = METHODS[method](base) | ({"terms": terms} if terms else {})
    own = AdversarialFineTuning(replace(base, lora=lora), **parts, seed=3)
    rows = _rows()
    own.attach(tinychat_format(), lambda: iter([rows]))
    # Adam's step is a ratio, in which rounding of a vanishing gradient is as large as any other.
    own.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [p for p in own.parameters() if p.requires_grad], lr=0.1
    )
    seen = _Seen()
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_steps=STEPS,
        max_epochs=1,
        log_every_n_steps=1,
        gradient_clip_val=0.3,
        default_root_dir=folder / f"{method}_{rank}_{world}",
        callbacks=[AttackHealth(), seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # The second step's rows are the first's: each process meets what the other has attacked.
    orders = [[0, 1, 2, 3], [3, 0, 1, 2]]
    batches = [
        TrainingBatch(
            rows.select(order[rank::world]) if harmful else None, _share(utility(seed), rank, world)
        )
        for seed, order in enumerate(orders)
    ]
    trainer.fit(own, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return {"weights": _whole(own), "start": seen.start, "logged": seen.logged, "passes": seen.passes}


def _whole(module: AdversarialFineTuning) -> dict[str, Tensor]:
    learned = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in learned.items()}


@cache
def _rows() -> AdversarialBatch:
    """Made once, before processes part: the whole corpus is encoded for it."""
    return text_batch(4)


def _share(rows: UtilityBatch, rank: int, world: int) -> UtilityBatch:
    own = slice(rank, None, world)
    return UtilityBatch(rows.input_ids[own], rows.attention_mask[own], rows.labels[own])


def go_together(rank: int, folder: str, port: int) -> None:
    """All methods under both strategies, then all disagreements, in one of two processes."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    soon = timedelta(seconds=120)
    for method in METHODS:
        partly = method == "circuit_breakers"
        ddp = DDPStrategy(timeout=soon, find_unused_parameters=partly)
        static = {"static_graph": DDPStrategy(static_graph=True)} if partly else {}
        for name, strategy in {"ddp": ddp, "fsdp2": FSDP2(), **static}.items():
            found = trained(method, Path(folder), rank, strategy)
            torch.save(found, Path(folder) / f"{method}_{name}_{rank}.pt")
    told = {name: _told(partial(case, rank)) for name, case in DISAGREEMENTS.items()}
    told["no gradient"] = _told(lambda: trained("circuit_breakers", Path(folder), rank, DDPStrategy()))
    own: list[Term] = [_NamesItsProcess(rank)]
    told["other losses"] = _told(
        lambda: trained("distillation", Path(folder), rank, DDPStrategy(), terms=own)
    )
    # Whose attack exchanges what it has found.
    told["no rows to attack"] = _told(lambda: trained("r2d2", Path(folder), rank, DDPStrategy(), rank == 0))
    torch.save(told, f"{folder}/told_{rank}.pt")
    torch.save(_health(rank), f"{folder}/health_{rank}.pt")


def _told(case: Callable[[], object]) -> str:
    try:
        case()
    except ValueError as error:
        return str(error)
    return ""


@contextmanager
def _sharded() -> Iterator[tuple[LanguageModel, ShardedWeights]]:
    module = tiny_model()
    weights = ShardedWeights(module, init_device_mesh("cpu", (2,)))
    yield LanguageModel(module, sharded=weights), weights


def _score(model: LanguageModel, rows: AdversarialBatch) -> Tensor:
    return model.labelled_log_probs(rows.prompt_ids, rows.prompt_mask, rows.prompt_ids)[0].sum()


def _a_further_pass(rank: int) -> None:
    with _sharded() as (model, weights):
        weights.outer_pass(lambda: sum(_score(model, ragged_batch()) for _ in range(1 + rank)))


def _a_pass_without_gradients(rank: int) -> None:
    def losses() -> Tensor:
        with torch.set_grad_enabled(rank == 0):
            return _score(model, ragged_batch())

    with _sharded() as (model, weights):
        weights.outer_pass(losses)


def _a_loss_without_one(rank: int) -> None:
    def losses() -> tuple[Tensor, str]:
        first, second = (_score(model, ragged_batch()) for _ in range(2))
        return (first + second if rank == 0 else first.detach() + second), "terms"

    with _sharded() as (model, weights):
        weights.outer_pass(losses)


def _no_attack_here(rank: int) -> None:
    with _sharded() as (model, weights):
        if rank == 0:
            with weights.gathered():
                pass
        weights.outer_pass(lambda: _score(model, ragged_batch()))


DISAGREEMENTS: dict[str, Callable[[int], None]] = {
    "a further pass": _a_further_pass,
    "a pass without gradients": _a_pass_without_gradients,
    "a loss without one": _a_loss_without_one,
    "no attack here": _no_attack_here,
}


def _health(rank: int) -> dict[str, dict[str, float]]:
    """What is logged where the first process's attack took no step, where it has no number for an example,
    and where neither process's has; the second's is sound otherwise."""
    model, rows = LanguageModel(tiny_model()), ragged_batch()
    sound = pgd()(model, rows)
    unknown = torch.zeros(len(rows))
    unknown[0] = torch.nan
    lost = replace(sound, loss_curve=sound.loss_curve + unknown, distance=sound.distance + unknown)
    none = NoAttack()(model, rows)
    return {
        "no step": _logged(sound if rank else none),
        "one lost": _logged(sound if rank else lost),
        "both lost": _logged(lost),
    }


def _logged(attacked: AttackedPrompt) -> dict[str, float]:
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(log_dict=lambda values, **how: logged.update(values))
    trainer: Any = SimpleNamespace(global_step=0)
    AttackHealth(warn_above=1.0).on_train_batch_end(trainer, module, {"attacked": attacked}, None, 0)
    return logged
