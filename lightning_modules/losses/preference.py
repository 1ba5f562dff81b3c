"""Preference losses on adversarial log-probability margins: CAPO (arXiv 2405.15589, eq. 6) and its relatives.
No utility data needed.

h = [ lp(y | x + delta) - lp(y_hat | x + delta) ] - [ lp0(y | x) - lp0(y_hat | x) ],   lp the mean
log-probability per token

The reference lp0 sees the clean prompt: with delta on the reference too, the paper found training unstable.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from datamodules.fields import NonNegative, Positive, checked
from lightning_modules.losses.base import LossTerms, ReplyScores
from lightning_modules.models.likelihood import mean_cross_entropy


def ipo(margin: Float[Tensor, " batch"], beta: float) -> Float[Tensor, " batch"]:
    """(h - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17)."""
    return (margin - 1.0 / (2.0 * beta)).square()


def sigmoid(margin: Float[Tensor, " batch"], beta: float) -> Float[Tensor, " batch"]:
    """-log sigmoid(beta h) (DPO; Rafailov et al. 2023, eq. 7)."""
    return -logsigmoid(beta * margin)


def hinge(margin: Float[Tensor, " batch"], beta: float) -> Float[Tensor, " batch"]:
    """max(0, 1 - beta h) (SLiC; Zhao et al. 2023, with a reference)."""
    return torch.relu(1.0 - beta * margin)


def npo(harmful_gain: Float[Tensor, " batch"], beta: float) -> Float[Tensor, " batch"]:
    """-(2 / beta) log sigmoid(-beta [lp(y_hat) - lp0(y_hat)]) (Zhang et al. 2024, eq. 3): unlearns the
    harmful reply alone."""
    return -(2.0 / beta) * logsigmoid(-beta * harmful_gain)


FORMS = {"ipo": ipo, "sigmoid": sigmoid, "hinge": hinge}


@checked
class Preference:
    """The safe reply is preferred to the harmful one under attack, by a margin over the reference's own
    preference.

    Args:
        form: `ipo` (CAPO), `sigmoid` (DPO), `hinge`, or `npo` (the harmful reply alone).
        beta: strength of the tie to the reference; `ipo` aims at a margin of 1 / (2 beta) nats per token.
        weight_toward: weight of CE of the safe reply under attack beside it; `npo` alone says nothing about
            what to reply.
        weight_utility: weight of CE on utility conversations, where the data has any; 0 does not score them.
    """

    needs_reference = True

    def __init__(
        self,
        form: Literal["ipo", "sigmoid", "hinge", "npo"] = "ipo",
        beta: Positive = 0.25,
        weight_toward: NonNegative = 0.0,
        weight_utility: NonNegative = 0.0,
    ) -> None:
        self.form = form
        self.beta = beta
        self.weight_toward = weight_toward
        self.weight_utility = weight_utility

    def adversarial(self, scores: ReplyScores) -> LossTerms:
        """Raises: ValueError for scores without a reference."""
        if scores.reference is None:
            raise ValueError(
                "Preference: expected reference log-probabilities, got none; the module computes them "
                "where needs_reference"
            )
        safe = -mean_cross_entropy(scores.safe_log_probs, scores.safe_mask)
        harmful = -mean_cross_entropy(scores.harmful_log_probs, scores.harmful_mask)
        # The table's fp64 is rounded after the subtraction, whose result may be small beside its two terms.
        margin = (safe - harmful) - (scores.reference.safe - scores.reference.harmful).to(safe)
        if self.form == "npo":
            preference = npo(harmful - scores.reference.harmful.to(harmful), self.beta)
        else:
            preference = FORMS[self.form](margin, self.beta)
        parts = {"loss_preference": preference, "margin": margin, "loss_toward": -safe, "loss_away": harmful}
        return LossTerms(
            preference - self.weight_toward * safe, {name: part.detach() for name, part in parts.items()}
        )

    def utility(self, log_probs: Tensor, mask: Tensor) -> LossTerms:
        loss = mean_cross_entropy(log_probs, mask)
        return LossTerms(self.weight_utility * loss, {"loss_utility": loss.detach()})
