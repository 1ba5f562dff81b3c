"""From batches to token log-probabilities: what training, validation and evaluation score."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.batch import AdversarialBatch, UtilityBatch
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.losses.base import ReferenceScores, ReplyScores
from lightning_modules.models.begun import remaining
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.reply import Reply


def score_replies(
    model: LanguageModel,
    batch: AdversarialBatch,
    attacked: AttackedPrompt,
    reference: ReferenceScores | None = None,
) -> ReplyScores:
    """Both replies under the same perturbation, the one found for the harmful target.

    Where an attack begins the replies with tokens of the target, the harmful one is what remains of it.

    Raises: ValueError for begun replies with a reference, whose scores are of whole replies.
    """
    safe_reply = Reply(batch.safe_ids, batch.safe_mask, tuple(own.safe for own in batch.lengths))
    if reference is not None and any(attacked.forced):
        raise ValueError(
            "model.attack: expected an attack that begins no reply beside an objective with a reference, "
            "whose scores are of whole replies; use another attack, or an objective without one"
        )
    harmful_lengths = tuple(own.harmful for own in batch.lengths)
    harmful_reply = Reply(batch.harmful_ids, batch.harmful_mask, harmful_lengths)
    harmful_reply = remaining(harmful_reply, attacked.forced)
    with attacked.applied(model) as embeds:
        safe, harmful = model.reply_log_probs(embeds, attacked.prompt_mask, safe_reply, harmful_reply)
    return ReplyScores(safe, safe_reply.mask, harmful, harmful_reply.mask, reference)


def score_utility(
    model: LanguageModel, batch: UtilityBatch
) -> tuple[Float[Tensor, "batch token-1"], Bool[Tensor, "batch token-1"]]:
    """Log-probabilities and mask of the utility replies' tokens."""
    own = batch.input_ids, batch.attention_mask, batch.labels
    return model.labelled_log_probs(*own, batch.num_scored, batch.common)
