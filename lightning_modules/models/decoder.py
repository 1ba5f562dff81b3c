"""What is read off a causal LM's modules, plain or wrapped by PEFT: its decoder stack, head and logits.

Here and in `masks.py` live the quirks of architectures: logit scales and soft caps, LoRA-wrapped and
quantised heads, eager attention's additive masks.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from lightning_modules.models.passes import count_passes
from lightning_modules.models.token_log_probs import LogitTransform, token_log_probs, token_scores


def causal_lm(module: nn.Module) -> PreTrainedModel:
    """The Hugging Face model, unwrapped from PEFT; adapters that were injected into it stay active."""
    wrapped = hasattr(module, "peft_config")
    base = module.get_base_model() if wrapped else module  # type: ignore[operator]
    model: PreTrainedModel = base  # type: ignore[assignment]
    return model


def text_config(module: nn.Module) -> PreTrainedConfig:
    """The configuration of the language part, where the model has others."""
    own = causal_lm(module).config
    config: PreTrainedConfig = own.get_text_config()  # type: ignore[operator, union-attr]
    return config


def weight_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the input embedding, in which the decoder takes its inputs."""
    return next(causal_lm(module).get_input_embeddings().parameters()).dtype


def decode(
    module: nn.Module,
    embeds: Float[Tensor, "batch token dim"],
    attention_mask: Any,
    positions: Int[Tensor, "batch token"],
    cache: Cache | None = None,
    replies: int = 1,
) -> Float[Tensor, "batch token dim"]:
    """Final hidden states; a cache is read and filled. Open pass counters hear of it.

    Args:
        module: the model.
        embeds: inputs as the decoder receives them.
        attention_mask: (batch, token), or additive masks as `branching_attention` makes them.
        positions: position ids.
        cache: keys and values of what stands before.
        replies: how many scored replies each row holds.
    """
    hidden = hidden_states(module, embeds, attention_mask, positions, cache)
    count_passes(hidden, len(embeds) * replies)
    return hidden


def hidden_states(
    module: nn.Module,
    embeds: Float[Tensor, "batch token dim"],
    attention_mask: Any,
    positions: Int[Tensor, "batch token"],
    cache: Cache | None = None,
) -> Float[Tensor, "batch token dim"]:
    """The same, which nobody hears of."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        attention_mask = attention_mask.long()
    out = causal_lm(module).get_decoder()(
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    hidden: Tensor = out.last_hidden_state
    return hidden


def logits_of(module: nn.Module, hidden: Float[Tensor, "row dim"]) -> Float[Tensor, "row token"]:
    """Logits over the vocabulary in fp32."""
    logits: Tensor = _logit_transform(module)(causal_lm(module).get_output_embeddings()(hidden).float())
    return logits


def log_probs_at(
    module: nn.Module,
    hidden: Float[Tensor, "batch token dim"],
    targets: Int[Tensor, "batch token"],
    where: Int[Tensor, " row"],
) -> Float[Tensor, "batch token"]:
    """Log-probabilities of the targets at the positions of these numbers in the flattened batch, 0 elsewhere.

    Numbers and no mask: at every use of a mask, in the backward pass too, the host would wait for the GPU to
    learn how many positions there are.
    """
    scores = target_log_probs(module, hidden.flatten(0, 1).index_select(0, where), targets.flatten()[where])
    whole = torch.zeros(targets.numel(), dtype=scores.dtype, device=scores.device)
    return whole.index_copy(0, where, scores).view(targets.shape)


def target_log_probs(
    module: nn.Module, hidden: Float[Tensor, "row dim"], targets: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Log-probability of one target per state, in fp32 or wider."""
    head = causal_lm(module).get_output_embeddings()
    if type(head) is nn.Linear:
        return token_log_probs(hidden, head.weight, head.bias, targets, _logit_transform(module))
    # A LoRA-wrapped or quantised head: its own forward, full logits of the scored positions only.
    logits = logits_of(module, hidden)
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


@torch.no_grad()
def scores_at(
    module: nn.Module,
    hidden: Float[Tensor, "batch token dim"],
    ids: Int[Tensor, "batch token"],
    where: Int[Tensor, " row"],
) -> tuple[Float[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
    """As `log_probs_at`, without a gradient, and whether each target is what greedy decoding would say; True
    elsewhere."""
    head = causal_lm(module).get_output_embeddings()
    hidden, targets = hidden.flatten(0, 1).index_select(0, where), ids.flatten().index_select(0, where)
    if type(head) is nn.Linear:
        scores, said = token_scores(hidden, head.weight, head.bias, targets, _logit_transform(module))
    else:
        logits = logits_of(module, hidden)
        own = logits.gather(1, targets[:, None]).squeeze(1)
        scores, said = own - logits.logsumexp(1), own == logits.amax(1)
    log_probs = torch.zeros(ids.numel(), dtype=scores.dtype, device=scores.device)
    told = torch.ones(ids.numel(), dtype=torch.bool, device=scores.device)
    return (
        log_probs.index_copy(0, where, scores).view(ids.shape),
        told.index_copy(0, where, said).view(ids.shape),
    )


def _logit_transform(module: nn.Module) -> LogitTransform:
    config = text_config(module)
    # Cohere multiplies, Granite divides; most do neither.
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale=float(scale), softcap=getattr(config, "final_logit_softcapping", None))
