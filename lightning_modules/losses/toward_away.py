"""The CAT objective (arXiv 2405.15589, eq. 3-4): towards the safe reply, away from the harmful one,
usefulness kept."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from datamodules.fields import Fraction, NonNegative, checked
from lightning_modules.losses.base import LossTerms, ReplyScores
from lightning_modules.models.likelihood import mean_cross_entropy, soft_cutoff, unlikelihood


@checked
class TowardAwayUtility:
    """w_t * CE(y | x + delta) + w_a * away(y_hat | x + delta) + w_u * CE_utility, each term cut off softly
    per example.

    Args:
        weight_toward: weight of CE of the safe reply; weights are magnitudes, directions are built in.
        weight_away: weight of the away term.
        weight_utility: weight of CE on utility conversations.
        cutoff_toward: toward loss (nats per token, >= 0) below which its slope falls to `cutoff_slope`; null
            for none.
        cutoff_away: away loss below which its slope falls; for `ce` it is -CE, so the cutoff is negative;
            null for none.
        away_form: `ce` is -CE(y_hat); `log1m` is -mean log(1 - p_t), which has its own floor and takes no
            cutoff below 0.
        cutoff_slope: remaining slope beyond a cutoff.
    """

    needs_reference = False

    # Weights and cutoffs are those of the CAT authors' code.
    def __init__(
        self,
        weight_toward: NonNegative = 0.5,
        weight_away: NonNegative = 0.5,
        weight_utility: NonNegative = 1.0,
        cutoff_toward: float | None = 0.5,
        cutoff_away: float | None = -5.0,
        away_form: Literal["ce", "log1m"] = "ce",
        cutoff_slope: Fraction = 1e-3,
    ) -> None:
        if weight_toward + weight_away + weight_utility == 0:
            raise ValueError(
                "TowardAwayUtility: expected a positive weight, got 0 for all three terms; set at least one"
            )
        if cutoff_toward is not None and cutoff_toward < 0:
            raise ValueError(
                f"TowardAwayUtility.cutoff_toward: expected >= 0 (a cross-entropy), got {cutoff_toward}; "
                "the negative cutoff belongs to cutoff_away"
            )
        if cutoff_away is not None and away_form == "ce" and cutoff_away > 0:
            raise ValueError(
                f"TowardAwayUtility.cutoff_away: expected <= 0 (the away loss is -CE), got {cutoff_away}; "
                "the positive cutoff belongs to cutoff_toward"
            )
        self.weight_toward = weight_toward
        self.weight_away = weight_away
        self.weight_utility = weight_utility
        self.cutoff_toward = cutoff_toward
        # log1m is never negative: the default, which is made for ce, would cut nothing off there.
        self.cutoff_away = cutoff_away if away_form == "ce" or (cutoff_away or 0) > 0 else None
        self.away_form = away_form
        self.cutoff_slope = cutoff_slope

    def adversarial(self, scores: ReplyScores) -> LossTerms:
        toward = mean_cross_entropy(scores.safe_log_probs, scores.safe_mask)
        away = (
            -mean_cross_entropy(scores.harmful_log_probs, scores.harmful_mask)
            if self.away_form == "ce"
            else unlikelihood(scores.harmful_log_probs, scores.harmful_mask)
        )
        loss = self.weight_toward * self._cut(toward, self.cutoff_toward) + self.weight_away * self._cut(
            away, self.cutoff_away
        )
        return LossTerms(loss, {"loss_toward": toward.detach(), "loss_away": away.detach()})

    def utility(self, log_probs: Tensor, mask: Tensor) -> LossTerms:
        loss = mean_cross_entropy(log_probs, mask)
        return LossTerms(self.weight_utility * loss, {"loss_utility": loss.detach()})

    def _cut(self, loss: Float[Tensor, " batch"], cutoff: float | None) -> Float[Tensor, " batch"]:
        return loss if cutoff is None else soft_cutoff(loss, cutoff, self.cutoff_slope)
