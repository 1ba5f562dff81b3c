"""Frozen models that training compares with: its own starting point, or a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch

from lightning_modules.models.adapters import disabled_adapters
from lightning_modules.models.decoder import causal_lm, weight_dtype
from lightning_modules.models.fingerprint import fingerprint
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig, load_seeded


class FrozenCopy:
    """A model of its own, loaded when first needed. It is no part of the module in training, so no checkpoint
    holds it.

    Args:
        config: which model.
        seed: seed under which it is loaded; only weights from scratch depend on it.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._config = config
        self._seed = seed
        self._loaded: LanguageModel | None = None

    @contextmanager
    def active(self, like: LanguageModel) -> Iterator[LanguageModel]:
        """The model in evaluation mode on the device of `like`, without gradients."""
        if self._loaded is None:
            weights = load_seeded(self._config, self._seed).to(like.device).eval().requires_grad_(False)
            self._loaded = LanguageModel(weights)
        with torch.no_grad():
            yield self._loaded

    def release(self) -> None:
        """Free the model; it is loaded again if it is needed again."""
        self._loaded = None


class Reference:
    """The policy as it was before training. Fresh adapters are switched off; otherwise a frozen copy is
    loaded when first needed.

    Args:
        policy: the model in training.
        base: how it was loaded.
        seed: seed under which it was loaded.
    """

    def __init__(self, policy: LanguageModel, base: ModelConfig, seed: int = 0) -> None:
        self._policy = policy
        # Adapters that were loaded with trained weights belong to the starting point: only fresh ones may be
        # switched off.
        self._copy = None if base.lora is not None else FrozenCopy(base, seed)
        self._cast: LanguageModel | None = None

    @contextmanager
    def active(self) -> Iterator[LanguageModel]:
        """The starting model in evaluation mode, without gradients, while the context lasts."""
        if self._copy is not None:
            with self._copy.active(self._policy) as model:
                yield model
        else:
            with torch.no_grad(), disabled_adapters(self._policy.module), self._policy.frozen():
                yield self._policy

    @contextmanager
    def alike(self) -> Iterator[LanguageModel]:
        """The same in the policy's present precision: a copy is loaded in its own, and the trainer may have
        changed the policy's. The copy itself stays as it was loaded: training may compare with it too."""
        with self.active() as model:
            dtype = weight_dtype(self._policy.module)
            if weight_dtype(model.module) == dtype:
                yield model
                return
            # Once for all batches of an evaluation; `release` frees it with the copy.
            if self._cast is None or weight_dtype(self._cast.module) != dtype:
                self._cast = LanguageModel(deepcopy(model.module).to(dtype=dtype))
            yield self._cast

    @property
    def key(self) -> str:
        """Digest of the starting weights and their dtype."""
        with self.active() as model:
            weights = fingerprint(causal_lm(model.module), leave_out="lora_" if self._copy is None else None)
            return f"{weights}-{weight_dtype(model.module)}"

    def release(self) -> None:
        """Free the copy, if there is one."""
        self._cast = None
        if self._copy is not None:
            self._copy.release()
