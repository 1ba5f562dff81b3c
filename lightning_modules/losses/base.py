"""What an objective is: scored replies in, per-example losses out. The one reduction happens in the LightningModule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ReplyScores:
    """Token log-probabilities of both replies of B adversarial examples, under the same perturbation."""

    safe_log_probs: Tensor
    """(B, S) log p(y_t | x + delta, y_<t)."""
    safe_mask: Tensor
    harmful_log_probs: Tensor
    """(B, H) log p(y_hat_t | x + delta, y_hat_<t)."""
    harmful_mask: Tensor


@dataclass(frozen=True)
class LossTerms:
    """Per-example losses (B,), already weighted, and detached unweighted parts for the logs."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """An outer loss: one term per adversarial example and one per utility example."""

    def adversarial(self, scores: ReplyScores) -> LossTerms: ...

    def utility(self, log_probs: Tensor, mask: Tensor) -> LossTerms:
        """log_probs and mask (B, T): the reply tokens of B utility conversations."""
        ...
