"""The narrow view of a causal language model that attacks, losses and evaluations share. Model quirks live here only.

What is handled: embeddings as the decoder receives them (Gemma scales inside its embedding module), logit soft-capping and
scaling, sliding-window layers, eager attention's need for additive masks, LoRA wrappers, missing pad tokens (masks say what
is padding, whatever id fills it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from lightning_modules.models.adapters import merged_adapters
from lightning_modules.models.token_log_probs import LogitTransform, token_log_probs


class Reply(NamedTuple):
    """A continuation to score: ids and mask of shape (B, R), right-padded."""

    ids: Tensor
    mask: Tensor


class Victim:
    """A causal LM (plain or wrapped by PEFT) behind embed / score / generate.

    Args:
        model: the Hugging Face model or PeftModel; it is not copied.
        merge_adapters: merge fp32 LoRA weights while the model is frozen for an attack (exact in fp32, never done below).
        share_prompt: score several replies to one prompt in a single forward pass that computes the prompt once.
    """

    def __init__(self, model: nn.Module, merge_adapters: bool = True, share_prompt: bool = True) -> None:
        self.model = model
        self.causal_lm: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator, assignment]
        self.config: PreTrainedConfig = self.causal_lm.config.get_text_config()  # type: ignore[operator, union-attr]
        self.merge_adapters = merge_adapters
        self.share_prompt = share_prompt
        self._norm_cache: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.embedding_weight.device

    @property
    def embedding_weight(self) -> Tensor:
        return next(iter(self.causal_lm.get_input_embeddings().parameters()))

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, D) embeddings as the decoder stack receives them."""
        embedded: Tensor = self.causal_lm.get_input_embeddings()(ids)
        return embedded

    @torch.no_grad()
    def mean_embedding_norm(self) -> Tensor:
        """Scalar rho: mean l2 norm over the vocabulary of the embedding the decoder receives. Recomputed when weights change."""
        module = self.causal_lm.get_input_embeddings()
        versions = tuple(p._version for p in module.parameters())
        if self._norm_cache is None or self._norm_cache[0] != versions:
            rows = torch.arange(self.embedding_weight.shape[0], device=self.device)
            wide = torch.promote_types(self._dtype(), torch.float32)
            norms = [module(chunk).to(wide).norm(dim=-1) for chunk in rows.split(32_768)]
            self._norm_cache = versions, torch.cat(norms).mean()
        return self._norm_cache[1]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode, no weight needs a gradient, fp32 adapters merged; everything is as before on leaving."""
        modes = [(module, module.training) for module in self.model.modules()]
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            with merged_adapters(self.model, enabled=self.merge_adapters):
                yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter in learning:
                parameter.requires_grad_(True)

    def reply_log_probs(self, prompt_embeds: Tensor, prompt_mask: Tensor, *replies: Reply) -> tuple[Tensor, ...]:
        """Log-probability of every reply token given the prompt and the reply's earlier tokens.

        Args:
            prompt_embeds: (B, P, D), left-padded, possibly perturbed; any float dtype.
            prompt_mask: (B, P) bool.
            replies: one or more continuations of the same prompts.

        Returns: one (B, R) fp32 tensor per reply, 0 where the reply's mask is False.
        """
        if len(replies) > 1 and not self.share_prompt:
            return tuple(self.reply_log_probs(prompt_embeds, prompt_mask, reply)[0] for reply in replies)
        prompt_length = prompt_embeds.shape[1]
        # A reply's last token predicts nothing that is scored, so it is not fed.
        fed = [Reply(reply.ids[:, :-1], reply.mask[:, :-1]) for reply in replies]
        embeds = torch.cat([prompt_embeds.to(self._dtype()), *(self.embed(part.ids) for part in fed)], dim=1)
        mask = torch.cat([prompt_mask, *(part.mask for part in fed)], dim=1)
        lengths = [part.ids.shape[1] for part in fed]
        positions = _restarting_positions(prompt_mask, [part.mask for part in fed])
        attention: Any = mask
        if len(replies) > 1:
            attention = self._branching_attention(mask, positions, prompt_length, lengths, embeds.dtype)
        hidden = self._decode(embeds, attention, positions)
        return tuple(self._score(hidden, reply, prompt_length, prompt_length + sum(lengths[:i])) for i, reply in enumerate(replies))

    def labelled_log_probs(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the labelled tokens of whole conversations.

        Args: all (B, T); labels are -100 where nothing is scored.

        Returns: (B, T - 1) log-probabilities of labels[:, 1:] (0 where unscored) and the (B, T - 1) bool mask of scored ones.
        """
        positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
        hidden = self._decode(self.embed(input_ids), attention_mask, positions)
        targets, scored = labels[:, 1:], labels[:, 1:] != -100
        return self._scatter(hidden[:, :-1][scored], targets[scored], scored), scored

    @torch.no_grad()
    def generate(self, prompt_embeds: Tensor, prompt_mask: Tensor, max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        """Greedy continuations of (B, P, D) prompts, each cut before the first stop token."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            out = self.causal_lm.generate(  # type: ignore[operator]
                inputs_embeds=prompt_embeds.to(self._dtype()),
                attention_mask=prompt_mask.long(),
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
                ),
            )
        finally:
            for module, training in modes:
                module.training = training
        stops = set(stop_ids)
        return [_until(row, stops) for row in out.tolist()]

    def _dtype(self) -> torch.dtype:
        return self.embedding_weight.dtype

    def _decode(self, embeds: Tensor, attention_mask: Any, positions: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D) final hidden states."""
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            attention_mask = attention_mask.long()
        out = self.causal_lm.get_decoder()(inputs_embeds=embeds, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _score(self, hidden: Tensor, reply: Reply, prompt_length: int, start: int) -> Tensor:
        """Scores one reply whose fed tokens occupy hidden[:, start:]; its first token is predicted by the prompt's last."""
        rest = reply.ids.shape[1] - 1
        predictors = torch.cat([hidden[:, prompt_length - 1 : prompt_length], hidden[:, start : start + rest]], dim=1)
        return self._scatter(predictors[reply.mask], reply.ids[reply.mask], reply.mask)

    def _scatter(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """(N, D) hidden states and (N,) targets of the True positions of mask -> mask-shaped log-probabilities."""
        head = self.causal_lm.get_output_embeddings()
        if type(head) is nn.Linear:
            scores = token_log_probs(hidden, head.weight, head.bias, targets, self._logit_transform())
        else:  # a LoRA-wrapped or quantised head: its own forward, full logits of the scored positions only
            logits = self._logit_transform()(head(hidden).float())
            scores = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
        return torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_scatter(mask, scores)

    def _logit_transform(self) -> LogitTransform:
        scale = getattr(self.config, "logit_scale", None) or 1.0 / (getattr(self.config, "logits_scaling", None) or 1.0)
        return LogitTransform(scale=float(scale), softcap=getattr(self.config, "final_logit_softcapping", None))

    def _branching_attention(
        self, mask: Tensor, positions: Tensor, prompt_length: int, lengths: Sequence[int], dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """Additive (B, 1, T, T) masks in which the replies see the prompt and themselves but not each other."""
        batch, total = mask.shape
        branch = torch.zeros(total, dtype=torch.long, device=mask.device)
        start = prompt_length
        for number, length in enumerate(lengths, start=1):
            branch[start : start + length] = number
            start += length
        causal = torch.ones(total, total, dtype=torch.bool, device=mask.device).tril()
        visible = causal & ((branch[None, :] == 0) | (branch[None, :] == branch[:, None]))
        # Padding attends to itself so that no softmax row is empty.
        allowed = (visible & mask[:, None, :]) | torch.eye(total, dtype=torch.bool, device=mask.device)

        def additive(window: int | None) -> Tensor:
            seen = allowed
            if window is not None:
                seen = seen & (positions[:, :, None] - positions[:, None, :] < window)
            floor = torch.finfo(dtype).min
            return torch.full((batch, 1, total, total), floor, dtype=dtype, device=mask.device).masked_fill(seen[:, None], 0.0)

        window = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if len(kinds) > 1:
            return {kind: additive(window if kind == "sliding_attention" else None) for kind in kinds}
        sliding = kinds == {"sliding_attention"} or (not kinds and getattr(self.config, "use_sliding_window", True))
        return additive(window if sliding else None)


def _restarting_positions(prompt_mask: Tensor, reply_masks: Sequence[Tensor]) -> Tensor:
    """(B, T) position ids: the prompt counts from 0, every reply continues from the prompt's end."""
    prompt = (prompt_mask.long().cumsum(1) - 1).clamp_min(0)
    end = prompt_mask.long().sum(1, keepdim=True)
    return torch.cat([prompt, *(end + torch.arange(m.shape[1], device=m.device) for m in reply_masks)], dim=1)


def _until(row: list[int], stops: set[int]) -> list[int]:
    for i, token in enumerate(row):
        if token in stops:
            return row[:i]
    return row
