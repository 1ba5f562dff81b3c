"""From batches to token log-probabilities: what training, validation and evaluation score."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.batch import AdversarialBatch, UtilityBatch
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.losses.base import ReferenceScores, ReplyScores
from lightning_modules.models.language_model import LanguageModel, Reply


def score_replies(
    model: LanguageModel,
    batch: AdversarialBatch,
    attacked: AttackedPrompt,
    reference: ReferenceScores | None = None,
) -> ReplyScores:
    """Both replies under the same perturbation, the one found for the harmful target."""
    _, harmful_lengths, safe_lengths = zip(*batch.lengths, strict=True) if batch.lengths else ((), (), ())
    replies = (
        Reply(batch.safe_ids, batch.safe_mask, safe_lengths),
        Reply(batch.harmful_ids, batch.harmful_mask, harmful_lengths),
    )
    with attacked.applied(model) as embeds:
        safe, harmful = model.reply_log_probs(embeds, attacked.prompt_mask, *replies)
    return ReplyScores(safe, batch.safe_mask, harmful, batch.harmful_mask, reference)


def score_utility(
    model: LanguageModel, batch: UtilityBatch
) -> tuple[Float[Tensor, "batch token-1"], Bool[Tensor, "batch token-1"]]:
    """Log-probabilities and mask of the utility replies' tokens."""
    own = batch.input_ids, batch.attention_mask, batch.labels
    return model.labelled_log_probs(*own, batch.num_scored)
