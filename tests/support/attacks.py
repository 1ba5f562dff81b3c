"""The one registry of attacks: an entry per way of use, small enough for a test, with what it promises.

The contract tests run over all of it, and every class that is an attack must stand here.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import lightning_modules.attacks
from callbacks.judges.exact import TargetPrefix
from datamodules.batch import AdversarialBatch
from datamodules.rows import HarmfulRow
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from lightning_modules.attacks.base import Attack, AttackedPrompt, NoAttack
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.refusal_direction import DirectionalAblation
from lightning_modules.attacks.embedding.smoothed_pgd import SmoothedPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt
from lightning_modules.attacks.repeat import Repeat
from lightning_modules.attacks.suffix.adaptive import AdaptiveGCG, Stage
from lightning_modules.attacks.suffix.beast import BEAST
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.initial_suffix import InitialSuffix
from lightning_modules.attacks.suffix.random_search import RandomSearch
from lightning_modules.attacks.suffix.through_defence import ThroughDefence
from lightning_modules.attacks.suffix.universal import UniversalSuffix
from lightning_modules.attacks.text.autodan import AutoDAN
from lightning_modules.attacks.text.choosers import FirstSuccess
from lightning_modules.attacks.text.pair import PAIR
from lightning_modules.attacks.text.rewrites import (
    BestOfN,
    DirectRequest,
    InContext,
    Noise,
    Prefilling,
    Rewrite,
    Templates,
)
from lightning_modules.attacks.text.transfer import TransferSuffixes
from lightning_modules.attacks.text.variants import Variant
from lightning_modules.attacks.training.begun_reply import BegunReply
from lightning_modules.attacks.training.gaussian_noise import GaussianNoise
from lightning_modules.attacks.training.mixture import Mixture
from lightning_modules.attacks.training.persistent_gcg import PersistentGCG
from lightning_modules.attacks.training.random_ablation import RandomAblation
from lightning_modules.attacks.training.rewrite_then_perturb import RewriteThenPerturb
from lightning_modules.attacks.training.suffix_generator import SuffixGenerator
from lightning_modules.defences.smooth_llm import SmoothLLM
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig
from lightning_modules.models.requests import Request
from tests.conftest import chat_model, ragged_batch, text_batch, tiny_model
from tests.support.rows import row, stored

SOURCE = TinyChatHarmful("train")


class Scripted:
    """A chat model that says what it was told to, in turn."""

    name, revision = "scripted", "1"

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = answers
        self.asked: list[Request] = []

    def replies(self, conversations: Sequence[Request], seed: int = 0) -> list[str]:
        start = len(self.asked)
        self.asked += conversations
        return [self.answers[i % len(self.answers)] for i in range(start, len(self.asked))]

    def clip(self, text: str, max_tokens: int) -> str:
        return text

    def escape(self, text: str) -> str:
        return text


class Recording(NoAttack):
    """No attack; keeps what the rng would have drawn next."""

    noise: ClassVar[list[torch.Tensor]] = []

    def __call__(
        self, model: LanguageModel, batch: AdversarialBatch, rng: torch.Generator | None = None
    ) -> AttackedPrompt:
        assert rng is not None
        self.noise.append(torch.rand(4, generator=rng))
        return super().__call__(model, batch, rng)


def pair(
    answers: Sequence[str] = ('{"improvement": "x", "prompt": "Please tell me a story about it."}',),
    **settings: int,
) -> PAIR:
    return PAIR(Scripted(answers), TargetPrefix(), num_streams=2, num_steps=2, max_new_tokens=8, **settings)


def persistent(reset_fraction: float = 0.0, reset_every: int = 50) -> PersistentGCG:
    return PersistentGCG(
        GCG(num_tokens=4, num_steps=2, width=8, topk=16, stop_at_target=False), reset_fraction, reset_every
    )


def suffix_generator() -> SuffixGenerator:
    return SuffixGenerator(
        ModelConfig("tinychat:helpful"), num_tokens=3, candidates=4, beams=2, updates=3, batch_size=4
    )


def random_ablation(**settings: Any) -> RandomAblation:
    harmless = TinyChatBenign("train", 8, categories=["guide"])
    finder = DirectionalAblation(SOURCE, harmless, num_fit=4, num_validation=2, max_kl=1e9)
    return RandomAblation(finder, **settings)


def small_gcg(num_tokens: int = 4, **settings: Any) -> GCG:
    return GCG(num_tokens=num_tokens, num_steps=2, width=6, topk=16, **settings)


def adaptive(share: bool) -> AdaptiveGCG:
    """Stages of every kind; on a random model nothing is ever said, so each example sees all of them."""
    stages = [
        Stage(small_gcg()),
        Stage(small_gcg(), "last"),
        Stage(small_gcg(5, place="around"), "found", repetitions=2),
    ]
    return AdaptiveGCG(stages, share=share)


def transfer() -> TransferSuffixes:
    """Replays two rows as a run with a GCG would have left them."""
    prompts = [own.prompt for own in SOURCE.rows() if isinstance(own, HarmfulRow)][:2]
    rows = [row(prompt, prompt=prompt, attacked=f"{prompt} x{i}") for i, prompt in enumerate(prompts)]
    return TransferSuffixes(stored(Path(tempfile.mkdtemp()), *rows), judge=None)


@dataclass(frozen=True)
class Case:
    """One attack under the contract."""

    build: Callable[[], Attack]
    text: bool = False
    """Whether it needs the batch's texts."""
    typed: bool = True
    """Whether such an attack's result can be typed."""
    keeps_best: bool = True
    """Whether the result is the best iterate, not the last one or none."""
    alone: bool = True
    """Whether a result does not depend on batch-mates."""
    target_tokens: int | None = None
    """How many of the target's first tokens its losses count."""
    stateful: bool = False
    """Whether it keeps something from one batch to the next."""

    def model(self, dtype: torch.dtype = torch.float32) -> LanguageModel:
        return chat_model(dtype=dtype) if self.text else LanguageModel(tiny_model(dtype=dtype))

    def batch(self, size: int = 3, start: int = 0) -> AdversarialBatch:
        return text_batch(size, start) if self.text else ragged_batch(size=size, start=start)


CASES: dict[str, Case] = {
    "none": Case(NoAttack, keeps_best=False),
    "pgd_l2": Case(lambda: EmbeddingPGD(epsilon=0.5, num_steps=5)),
    "pgd_sign_last": Case(
        lambda: EmbeddingPGD(epsilon=0.5, num_steps=4, step_rule="sign", step_size=0.1, keep="last"),
        keeps_best=False,
    ),
    "pgd_linf": Case(lambda: EmbeddingPGD(epsilon=0.1, num_steps=4, ball="linf", step_rule="sign")),
    "pgd_adam": Case(lambda: EmbeddingPGD(epsilon=0.5, num_steps=4, step_rule="adam", step_size=0.1)),
    "pgd_absolute": Case(
        lambda: EmbeddingPGD(
            epsilon=0.05, radius_unit="absolute", step_unit="absolute", step_size=0.01, num_steps=3
        )
    ),
    "pgd_random": Case(lambda: EmbeddingPGD(epsilon=0.5, num_steps=3, random_start=True)),
    "pgd_stop": Case(lambda: EmbeddingPGD(epsilon=0.8, num_steps=6, stop_loss=4.55)),
    "fgsm": Case(lambda: EmbeddingPGD(epsilon=0.2, num_steps=1, step_size=1.0, step_rule="sign")),
    "restarts": Case(lambda: Repeat(EmbeddingPGD(epsilon=0.5, num_steps=2, random_start=True), 3)),
    # Losses of different draws of the noise do not compare.
    "smoothed_pgd": Case(
        lambda: SmoothedPGD(EmbeddingPGD(epsilon=0.5, num_steps=2), sigma=0.2, num_draws=2), keeps_best=False
    ),
    "soft_prompt": Case(lambda: SoftPrompt(num_tokens=3, num_steps=4, step_size=0.1)),
    "latent": Case(lambda: LatentPGD([0, 1], epsilon=0.5, radius_unit="embedding_norm", num_steps=4)),
    "latent_layer": Case(
        lambda: LatentPGD([0], embedding=False, epsilon=0.3, ball="linf", step_rule="sign", num_steps=3)
    ),
    # Prompts that nobody changed; its loss is that of a model without the direction.
    "directional_ablation": Case(
        lambda: DirectionalAblation(
            SOURCE, TinyChatBenign("train", 8, categories=["guide"]), num_fit=4, num_validation=2, max_kl=1e9
        ),
        text=True,
        typed=False,
    ),
    "mixture": Case(
        lambda: Mixture(
            [EmbeddingPGD(epsilon=0.5, num_steps=3), SoftPrompt(num_tokens=3, num_steps=2, step_size=0.1)]
        )
    ),
    "direct": Case(DirectRequest, text=True),
    "rewrite": Case(
        lambda: Rewrite(lambda prompt, target, rng: [Variant(prompt), Variant(f"{prompt} Go!")]), text=True
    ),
    "prefilling": Case(lambda: Prefilling(3), text=True),
    "in_context": Case(lambda: InContext(SOURCE, num_shots=2, num_samples=2), text=True),
    "role_play": Case(lambda: Templates("role_play"), text=True),
    "prompt_injection": Case(lambda: Templates("prompt_injection"), text=True),
    "encodings": Case(lambda: Templates("encodings"), text=True),
    "best_of_n": Case(
        lambda: BestOfN(4, chooser=FirstSuccess(TargetPrefix(), at_once=2, max_new_tokens=4)), text=True
    ),
    "character_noise": Case(lambda: Noise("character", num_samples=3), text=True),
    "word_noise": Case(lambda: Noise("word", rate=0.3, num_samples=3), text=True),
    "repeated_noise": Case(lambda: Repeat(Noise("character", rate=0.3), 3), text=True),
    "repeated_until_judged": Case(
        lambda: Repeat(Noise("word", rate=0.3), 3, judge=TargetPrefix(), max_new_tokens=4), text=True
    ),
    "repeated_random_search": Case(
        lambda: Repeat(RandomSearch(num_tokens=6, num_steps=2), 2), text=True, target_tokens=1
    ),
    "autodan": Case(lambda: AutoDAN(num_steps=3, population=6, mutation=0.5), text=True),
    # Its attacker's answers depend on the order of asking.
    "pair": Case(pair, text=True, alone=False),
    "initial_suffix": Case(lambda: InitialSuffix(5), text=True),
    "gcg": Case(lambda: GCG(num_tokens=5, num_steps=2, width=6, topk=16), text=True),
    "gcg_options": Case(
        lambda: GCG(
            num_tokens=5,
            num_steps=2,
            width=6,
            topk=16,
            n_replace=2,
            buffer_size=3,
            mellowmax_alpha=2.0,
            ascii_only=False,
        ),
        text=True,
    ),
    "gcg_before": Case(lambda: small_gcg(place="before", merge=2), text=True),
    "gcg_around": Case(lambda: small_gcg(5, place="around", n_replace=2, merge=1), text=True),
    "initial_around": Case(lambda: InitialSuffix(5, place="around"), text=True),
    "adaptive_gcg": Case(lambda: adaptive(share=False), text=True),
    "adaptive_gcg_shared": Case(lambda: adaptive(share=True), text=True, alone=False),
    # One suffix for all: made for the batch, and no request's own best.
    "universal": Case(
        lambda: UniversalSuffix(num_tokens=4, num_steps=3, width=6, topk=16, join_every=1),
        text=True,
        alone=False,
        keeps_best=False,
    ),
    "transfer": Case(transfer, text=True),
    "beast": Case(lambda: BEAST(num_tokens=3, beams=2, samples=4), text=True),
    "random_search": Case(
        lambda: RandomSearch(num_tokens=6, num_steps=4, width=2), text=True, target_tokens=1
    ),
    "through_defence": Case(
        lambda: ThroughDefence(
            SmoothLLM(TargetPrefix(), num_copies=2), num_tokens=4, num_steps=2, width=4, topk=16, num_draws=2
        ),
        text=True,
        keeps_best=False,
    ),
    "persistent_gcg": Case(persistent, text=True, stateful=True),
    "suffix_generator": Case(suffix_generator, text=True, alone=False, stateful=True),
    "stateful_mixture": Case(
        lambda: Mixture([persistent(), EmbeddingPGD(epsilon=0.2, num_steps=2)]),
        text=True,
        typed=False,
        keeps_best=False,
        stateful=True,
    ),
    "begun_reply": Case(
        lambda: BegunReply(EmbeddingPGD(epsilon=0.2, num_steps=2), longest=3, probability=1.0),
        keeps_best=False,  # its losses are those of the prompt, before a reply was begun
    ),
    # Its losses are those of the attack, before the noise.
    "gaussian_noise": Case(
        lambda: GaussianNoise(0.5, EmbeddingPGD(epsilon=0.2, num_steps=2)), keeps_best=False
    ),
    "gaussian_noise_alone": Case(lambda: GaussianNoise(0.5), keeps_best=False),
    "noisy_ablation": Case(
        lambda: GaussianNoise(0.5, random_ablation()),
        text=True,
        typed=False,
        keeps_best=False,
        alone=False,
        stateful=True,
    ),
    # No search: it draws what the model has to do without. What finding it costs is shared by the batch.
    "random_ablation": Case(
        random_ablation, text=True, typed=False, keeps_best=False, alone=False, stateful=True
    ),
    "rewrite_then_perturb": Case(
        lambda: RewriteThenPerturb(persistent(), EmbeddingPGD(epsilon=0.2, num_steps=2), probability=1.0),
        text=True,
        typed=False,
        stateful=True,
    ),
}
"""All attacks by the name of their use."""


def attack_classes() -> dict[str, type]:
    """Class path -> every class of the project that is called like an attack."""
    package = lightning_modules.attacks
    found: dict[str, type] = {}
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name, cls in inspect.getmembers(module, inspect.isclass):
            call = inspect.signature(cls.__call__).parameters if "__call__" in dir(cls) else {}
            own = cls.__module__ == module.__name__ and not getattr(cls, "_is_protocol", False)
            if own and list(call) == ["self", "model", "batch", "rng"]:
                found[f"{module.__name__}.{name}"] = cls
    return found
