"""What a loss is made of: an objective on scored replies, and further terms on whatever they need. All losses
are per example.

The one reduction happens in the LightningModule: the loss is the sum of the means of all terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.batch import TrainingBatch
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import Attacked, LanguageModel


@dataclass(frozen=True)
class ReferenceScores:
    """Mean log-probabilities per token of both replies under the reference model, on the clean prompts."""

    safe: Float[Tensor, " batch"]
    """lp0(y | x)."""
    harmful: Float[Tensor, " batch"]
    """lp0(y_hat | x)."""


@dataclass(frozen=True)
class ReplyScores:
    """Token log-probabilities of both replies of adversarial examples, under the same perturbation."""

    safe_log_probs: Float[Tensor, "batch safe"]
    """log p(y_t | x + delta, y_<t)."""
    safe_mask: Bool[Tensor, "batch safe"]
    harmful_log_probs: Float[Tensor, "batch harmful"]
    """log p(y_hat_t | x + delta, y_hat_<t)."""
    harmful_mask: Bool[Tensor, "batch harmful"]
    reference: ReferenceScores | None = None
    """Present where the objective asks for it."""


@dataclass(frozen=True)
class LossTerms:
    """Losses, already weighted, one per example, or one number where a term has no examples or joins both
    streams; and detached parts for the logs."""

    loss: Float[Tensor, " batch"] | Float[Tensor, ""]
    parts: dict[str, Float[Tensor, " batch"] | Float[Tensor, ""]] = field(default_factory=dict)


class Objective(Protocol):
    """An outer loss on scored replies: one loss per adversarial example and one per utility example."""

    needs_reference: bool
    """Whether `ReplyScores.reference` must be there."""
    weight_utility: float
    """0 leaves the utility rows to the further terms: they are not scored."""

    def adversarial(self, scores: ReplyScores) -> LossTerms: ...

    # No shapes in this annotation: the command line takes a class as an objective only where it repeats the
    # protocol's annotations to the letter, and a user's own class says Tensor.
    def utility(self, log_probs: Tensor, mask: Tensor) -> LossTerms:
        """log_probs and mask (batch, token): the reply tokens of utility conversations."""
        ...


@dataclass(frozen=True)
class Step:
    """One micro-batch of training as a further term of the loss sees it."""

    model: LanguageModel
    reference: Reference
    batch: TrainingBatch
    attacked: Attacked | None
    """None without adversarial rows."""
    number: int
    """Optimiser steps taken."""
    total: int
    """Optimiser steps of the whole run."""


class Term(Protocol):
    """A further term of the loss: a regulariser, or a loss on hidden states or whole distributions."""

    def __call__(self, step: Step) -> LossTerms: ...
