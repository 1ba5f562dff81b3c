"""A model as it is: what evaluations, attacks and `predict` need, and what training modules build on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.tensor import DTensor

from datamodules.batch import AdversarialBatch, EvaluationBatch
from datamodules.fields import Count, NonNegativeInt, checked
from datamodules.text.chat_format import ChatFormat
from lightning_modules.defences.base import Defence, Defended, label, requests_of
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import Encoded, LanguageModel
from lightning_modules.models.loading import ModelConfig, has_adapter, load_seeded
from lightning_modules.models.requests import Decoding
from lightning_modules.sharded import FSDP2, check_sharding

PREDICTED_TOKENS = 64
"""Longest reply of `predict`, where the module says nothing else."""
CUT_WITHIN = 4
"""A reply that is as long as allowed, to so many tokens, counts as cut off: tokenising it again may take some
fewer or more."""
STRATEGIES = (SingleDeviceStrategy, DDPStrategy, FSDP2)
"""What is known to give every process the same weights."""


HarmfulBatches = Callable[[], Iterator[AdversarialBatch]]
"""All harmful training rows in order, for what is computed once per row."""


@checked
class PretrainedModel(LightningModule):
    """Loads a model in `configure_model`, after the whole configuration has been checked; nothing in it
    learns.

    Args:
        base: the model.
        seed: seed of what is random about loading it; null takes seed_everything's.
        predicted_tokens: longest reply of `predict`.
        defence: what stands around the model in `validate`, `test` and `predict`; training knows none.
    """

    model: nn.Module
    language_model: LanguageModel
    replied: list[dict[str, str | bool]] | None = None
    """`predict_step`'s next rows, where an earlier call of `predict` got them from the same model."""

    def __init__(
        self,
        base: ModelConfig,
        seed: NonNegativeInt | None = None,
        predicted_tokens: Count = PREDICTED_TOKENS,
        defence: Defence | None = None,
    ) -> None:
        super().__init__()
        self.defence = defence
        self.predicted_tokens = predicted_tokens
        self.base = base
        self.seed = 0 if seed is None else seed
        self._chat: ChatFormat | None = None
        self._harmful_batches: HarmfulBatches | None = None
        # Adapter checkpoints hold the learning weights only; the rest comes from the base model.
        self.strict_loading = False

    @property
    def load_seed(self) -> int:
        """Seed of what is random about loading the model."""
        return step_seed(self.seed, -1, 0)

    def attach(self, chat: ChatFormat, harmful_batches: HarmfulBatches | None = None) -> None:
        """Hand over what the module needs of the data, before the model is loaded.

        Args:
            chat: the model's chat format.
            harmful_batches: the training rows; only training with a reference needs them.
        """
        self._chat, self._harmful_batches = chat, harmful_batches

    def setup(self, stage: str) -> None:
        """Raises: ValueError under a strategy that would not synchronise gradients, or without a chat
        format."""
        check_strategy(self.trainer.strategy)
        if self._chat is None:
            raise ValueError(
                f"{type(self).__name__} has no chat format; expected data of "
                "datamodules.evaluation.EvaluationData or a class that builds on it (in Python, call "
                "attach(data.chat) before training)"
            )

    def configure_model(self) -> None:
        """Load the model once, on first use."""
        if not hasattr(self, "model"):
            strategy = self._sharding()
            self.model = load_seeded(self.base, self.load_seed)
            self._check_tokenizer()
            sharded = None if strategy is None else strategy.sharded(self.model)
            merge = None if self.base.lora is None else self.base.lora.merge
            self.language_model = LanguageModel(
                self.model,
                chat=self._chat,
                merge_adapters=merge != "never",
                merge_rounded=merge == "rounded",
                sharded=sharded,
                compiled=self.base.compile_attacks,
            )

    def _check_tokenizer(self) -> None:
        """Raises: ValueError for a tokenizer whose tokens the model cannot embed: it is another model's."""
        # Those that were added (a pad token, say) may never be used.
        known = self._chat.tokenizer.vocab_size if isinstance(self._chat, ChatFormat) else 0
        embedded = causal_lm(self.model).get_input_embeddings().weight.shape[0]
        if known > embedded:
            raise ValueError(
                f"data.tokenizer: {known} tokens, but {self.base.name_or_path} embeds {embedded}; set its own"
            )

    def _sharding(self) -> FSDP2 | None:
        """The strategy, where it divides the weights: only training needs that. Raises: ValueError for what
        it cannot divide."""
        trainer = self._trainer
        if (
            trainer is None
            or trainer.state.fn != TrainerFn.FITTING
            or not isinstance(trainer.strategy, FSDP2)
        ):
            return None
        check_sharding(self.base, str(trainer.precision))
        return trainer.strategy

    def whole(self) -> PretrainedModel:
        """This module, or where its weights lie in pieces a copy with all of them on this process's CPU. All
        processes call it together."""
        pieces = {name: p for name, p in self.named_parameters() if isinstance(p, DTensor)}
        if not pieces:
            return self
        # One after the other: on the device there is room for one.
        learned = {name: p.full_tensor().cpu() for name, p in pieces.items() if p.requires_grad}
        copy = PretrainedModel(self.base, self.seed)
        copy.attach(self.language_model.chat)
        copy.configure_model()
        copy.load_state_dict(learned, strict=False)
        return copy

    def before_training(self) -> Reference:
        """The model that `base` names, as it was before this run's training; nothing is loaded yet."""
        return Reference(self.language_model, self.base, self.load_seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop frozen weights from the checkpoint where only adapters learn.

        Raises: FloatingPointError on every process, before anything is written, where one of them has weights
            that are not finite: a loss without a number, of another process too, has spoilt them.
        """
        if has_adapter(self.model):
            learning = {name for name, p in self.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in learning}
        kept = checkpoint["state_dict"].items()
        spoilt = next((k for k, v in kept if v.is_floating_point() and not v.isfinite().all()), None)
        if not self._all_processes(spoilt is None):
            where = f"e.g. {spoilt!r}" if spoilt is not None else "on another process"
            raise FloatingPointError(
                f"weights are not finite at step {self.global_step}, {where}: no checkpoint is written; "
                "lower optimizer.lr, or set a cutoff_away"
            )

    def _all_processes(self, decision: bool) -> bool:
        """Whether all of them say so; without a trainer there is one."""
        trainer = self._trainer
        return decision if trainer is None else trainer.strategy.reduce_boolean_decision(decision)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint holds exactly the weights that learn here.

        Raises: ValueError naming a missing, unknown or differently shaped weight.
        """
        learning = {name for name, p in self.named_parameters() if p.requires_grad}
        given, own = checkpoint["state_dict"], self.state_dict()
        missing, unknown = learning - set(given), set(given) - set(own)
        shapes = {name for name in set(given) & set(own) if given[name].shape != own[name].shape}
        if missing or unknown or shapes:
            name = sorted(missing | unknown | shapes)[0]
            raise ValueError(
                f"the checkpoint does not fit this model: {len(missing)} weights missing, {len(unknown)} "
                f"unknown, {len(shapes)} of another shape, e.g. {name!r}; use the configuration that the run "
                "folder's config.yaml holds"
            )

    def predict_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, str | bool]]:
        """Greedy replies to a batch of evaluation prompts, as text; `cut`: longer than `predicted_tokens`."""
        if self.replied is not None:
            return self.replied
        decoding = Decoding(max_new_tokens=self.predicted_tokens)
        if self.defence is None:
            encoded = Encoded(batch.prompt_ids, batch.prompt_mask)
            replies = self.language_model.reply(encoded, decoding)
        else:
            replies = Defended(self.language_model, self.defence).reply(requests_of(batch), decoding)
        around: dict[str, str | bool] = {} if self.defence is None else {"defence": label(self.defence)}
        return [
            {"key": key, "prompt": prompt, "reply": reply, "cut": self._is_cut(reply), **around}
            for key, prompt, reply in zip(batch.keys, batch.prompts, replies, strict=True)
        ]

    def _is_cut(self, reply: str) -> bool:
        # No tokenizer takes half a surrogate pair.
        (ids,) = self.language_model.chat.encode_batch([reply.encode(errors="replace").decode()])
        return len(ids) > self.predicted_tokens - CUT_WITHIN


def check_strategy(strategy: object) -> None:
    """Raises: ValueError for a strategy under which processes would silently train models of their own.

    The steps call the model's parts rather than a wrapped forward, so that a strategy which synchronises in
    the wrapper does not; `FSDP2` knows of it. Subclasses count as other strategies: DeepSpeed's is one of
    DDP's.
    """
    if type(strategy) not in STRATEGIES:
        raise ValueError(
            f"trainer.strategy: {type(strategy).__name__} is not supported (gradients would not be "
            "synchronised between processes); set trainer.strategy: ddp, trainer.devices: 1, or --config "
            "configs/trainer/fsdp2.yaml"
        )


def step_seed(seed: int, step: int, rank: int) -> int:
    """63-bit seed of one (run seed, step, rank)."""
    name = f"{seed}/{step}/{rank}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
