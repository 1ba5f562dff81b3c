"""The narrow view of a causal language model that attacks, losses and evaluations share. Model quirks live
here only.

What is handled: embeddings as the decoder receives them (Gemma scales inside its embedding module), logit
    soft-capping and
scaling, sliding-window layers, eager attention's need for additive masks, LoRA wrappers, missing pad tokens
(masks say what is padding, whatever id fills it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel

from datamodules.text.chat_format import ChatFormat
from lightning_modules.models.adapters import merged_adapters
from lightning_modules.models.prefix_cache import PrefixCache
from lightning_modules.models.token_log_probs import LogitTransform, token_log_probs


class Reply(NamedTuple):
    """A continuation to score: ids and mask of shape (B, R), right-padded."""

    ids: Tensor
    mask: Tensor


class LanguageModel:
    """A causal LM (plain or wrapped by PEFT) behind embed / score / generate.

    Args:
        module: the Hugging Face model or PeftModel; it is not copied.
        merge_adapters: merge fp32 LoRA weights while the model is frozen for an attack (exact in fp32, never
            done below).
        share_prompt: score several replies to one prompt in a single forward pass that computes the prompt
            once.
        chat: the model's chat format; attacks that write text need it, those on embeddings do not.
    """

    def __init__(
        self,
        module: nn.Module,
        merge_adapters: bool = True,
        share_prompt: bool = True,
        chat: ChatFormat | None = None,
    ) -> None:
        self.module = module
        self._chat = chat
        wrapped = hasattr(module, "peft_config")
        self.causal_lm: PreTrainedModel = module.get_base_model() if wrapped else module  # type: ignore[operator, assignment]
        self.config: PreTrainedConfig = self.causal_lm.config.get_text_config()  # type: ignore[operator, union-attr]
        self.merge_adapters = merge_adapters
        self.share_prompt = share_prompt
        self._norm_cache: tuple[tuple[int, ...], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.embedding_weight.device

    @property
    def chat(self) -> ChatFormat:
        """The model's chat format. Raises: ValueError where none was given."""
        if self._chat is None:
            raise ValueError(
                "expected a model with a chat format for an attack that writes text, got none; set "
                "LanguageModel(model, chat=...)"
            )
        return self._chat

    @chat.setter
    def chat(self, chat: ChatFormat) -> None:
        self._chat = chat

    @property
    def embedding_weight(self) -> Tensor:
        return next(iter(self.causal_lm.get_input_embeddings().parameters()))

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, D) embeddings as the decoder stack receives them."""
        embedded: Tensor = self.causal_lm.get_input_embeddings()(ids)
        return embedded

    @torch.no_grad()
    def embedding_table(self) -> Tensor:
        """(V, D) embedding of every token as the decoder receives it; the weight itself where the module only
        looks it up."""
        module = self.causal_lm.get_input_embeddings()
        if type(module) is nn.Embedding:
            return module.weight
        return torch.cat(
            [
                module(chunk)
                for chunk in torch.arange(self.embedding_weight.shape[0], device=self.device).split(32_768)
            ]
        )

    @torch.no_grad()
    def mean_embedding_norm(self) -> Tensor:
        """Scalar rho: mean l2 norm over the vocabulary of the embedding the decoder receives. Recomputed when
        weights change."""
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
        """Evaluation mode, no weight needs a gradient, fp32 adapters merged; everything is as before on
        leaving."""
        modes = [(part, part.training) for part in self.module.modules()]
        learning = [p for p in self.module.parameters() if p.requires_grad]
        self.module.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            with merged_adapters(self.module, enabled=self.merge_adapters):
                yield
        finally:
            for part, training in modes:
                part.training = training
            for parameter in learning:
                parameter.requires_grad_(True)

    def reply_log_probs(
        self, prompt_embeds: Tensor, prompt_mask: Tensor, *replies: Reply
    ) -> tuple[Tensor, ...]:
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
        return tuple(
            self._score(hidden, reply, prompt_length, prompt_length + sum(lengths[:i]))
            for i, reply in enumerate(replies)
        )

    def labelled_log_probs(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the labelled tokens of whole conversations.

        Args: all (B, T); labels are -100 where nothing is scored.

        Returns: (B, T - 1) log-probabilities of labels[:, 1:] (0 where unscored) and the (B, T - 1) bool mask
            of scored ones.
        """
        positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
        hidden = self._decode(self.embed(input_ids), attention_mask, positions)
        targets, scored = labels[:, 1:], labels[:, 1:] != -100
        return self._scatter(hidden[:, :-1][scored], targets[scored], scored), scored

    def labelled_logits(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(N, V) fp32 logits that predict the N labelled tokens of whole conversations, and their (B, T - 1)
        bool mask."""
        positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
        scored = labels[:, 1:] != -100
        return self._logits(
            self._decode(self.embed(input_ids), attention_mask, positions)[:, :-1][scored]
        ), scored

    def reply_logits(self, prompt_embeds: Tensor, prompt_mask: Tensor, reply: Reply) -> Tensor:
        """(N, V) fp32 logits that predict the N tokens of (B, R) replies, in the order of `reply.mask`."""
        hidden = self._decode(*self._continued(prompt_embeds, prompt_mask, reply))
        return self._logits(
            self._predictors(hidden, reply, prompt_embeds.shape[1], prompt_embeds.shape[1])[reply.mask]
        )

    def conversation_states(
        self, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]
    ) -> list[Tensor]:
        """(B, T, D) output of each of the decoder layers, counted from 0, on whole conversations."""
        positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
        with self._recorded(layers) as states:
            self._decode(self.embed(input_ids), attention_mask, positions)
        return [states[layer] for layer in layers]

    def reply_states(
        self, prompt_embeds: Tensor, prompt_mask: Tensor, reply: Reply, layers: Sequence[int]
    ) -> list[Tensor]:
        """(B, R - 1, D) output of each of the decoder layers at a reply's tokens; the last one predicts
        nothing and is not fed."""
        with self._recorded(layers) as states:
            self._decode(*self._continued(prompt_embeds, prompt_mask, reply))
        return [states[layer][:, prompt_embeds.shape[1] :] for layer in layers]

    def embedding_matrix(self) -> Tensor:
        """(V, D) weight of the input embedding with its adapters' delta, differentiable in both."""
        module = self.causal_lm.get_input_embeddings()
        if not isinstance(module, LoraEmbedding):
            return self.embedding_weight
        deltas = [module.get_delta_weight(name) for name in module.active_adapters]
        return torch.stack([module.get_base_layer().weight, *deltas]).sum(0)

    @torch.no_grad()
    def prefix_cache(self, ids: Tensor, mask: Tensor) -> PrefixCache:
        """Compute the keys and values of (B, P) left-padded prompt beginnings, P at least 1."""
        cache = DynamicCache()
        self._decode(self.embed(ids), mask, (mask.long().cumsum(1) - 1).clamp_min(0), cache)
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        return PrefixCache(mask, layers)

    @torch.no_grad()
    def extend_cache(self, prefix: PrefixCache, rows: Tensor, embeds: Tensor, mask: Tensor) -> PrefixCache:
        """The beginnings `rows` (N,) of a cache, each continued by (N, M, D) embeddings with their (N, M)
        mask."""
        cache = prefix.rows(rows)
        self._continue(prefix, rows, embeds, mask, cache)
        return cache.extended(torch.cat([prefix.mask[rows], mask], dim=1))

    def continued_log_probs(
        self, prefix: PrefixCache, rows: Tensor, embeds: Tensor, mask: Tensor, reply: Reply
    ) -> Tensor:
        """Log-probabilities of N replies to prompts that continue cached beginnings.

        Args:
            prefix: the beginnings; they hold no gradient.
            rows: (N,) which beginning each row continues.
            embeds: (N, M, D) the prompts' rest; (N, M) mask, left-padded where a prompt is shorter than M.
            reply: (N, R) replies.

        Returns: (N, R) fp32, 0 where the reply's mask is False.
        """
        fed = Reply(reply.ids[:, :-1], reply.mask[:, :-1])
        whole = torch.cat([embeds.to(self._dtype()), self.embed(fed.ids)], dim=1)
        hidden = self._continue(prefix, rows, whole, torch.cat([mask, fed.mask], dim=1))
        return self._score(hidden, reply, mask.shape[1], mask.shape[1])

    @torch.no_grad()
    def next_token_logits(self, prefix: PrefixCache, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, V) fp32 logits of the token after each continued prompt; arguments as in `continued_log_probs`,
        ids (N, M)."""
        hidden = self._continue(prefix, rows, self.embed(ids), mask)[:, -1]
        return self._logits(hidden)

    @torch.no_grad()
    def replies_greedily(self, prompt_embeds: Tensor, prompt_mask: Tensor, reply: Reply) -> Tensor:
        """(B,) bool: whether greedy decoding of each prompt begins with exactly this reply."""
        hidden = self._decode(*self._continued(prompt_embeds, prompt_mask, reply))[
            :, prompt_mask.shape[1] - 1 :
        ]
        wrong = torch.zeros_like(reply.mask)
        wrong[reply.mask] = self._logits(hidden[reply.mask]).argmax(-1) != reply.ids[reply.mask]
        return ~wrong.any(1)

    @contextmanager
    def perturbed_layers(self, deltas: Mapping[int, Tensor]) -> Iterator[None]:
        """Add deltas[l] (B, P, D) to the output of decoder layer l at a prompt's P positions, wherever a
        whole prompt passes.

        Steps of generation that feed single tokens pass unchanged: their prompt's perturbed states are in the
        cache.
        """

        def hook_of(delta: Tensor) -> Any:
            def hook(module: nn.Module, inputs: object, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                length = delta.shape[1]
                if hidden.shape[1] < length:
                    return output
                moved = torch.cat([(hidden[:, :length] + delta).to(hidden.dtype), hidden[:, length:]], dim=1)
                return (moved, *output[1:]) if isinstance(output, tuple) else moved

            return hook

        layers = self.causal_lm.get_decoder().layers
        handles = [layers[number].register_forward_hook(hook_of(delta)) for number, delta in deltas.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def generate(
        self,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> list[list[int]]:
        """Continuations of (B, P, D) prompts, each cut before the first stop token; greedy unless the
        temperature is above 0."""
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p}
            if temperature > 0
            else {"do_sample": False}
        )
        modes = [(part, part.training) for part in self.module.modules()]
        self.module.eval()
        try:
            out = self.causal_lm.generate(  # type: ignore[operator]
                inputs_embeds=prompt_embeds.to(self._dtype()),
                attention_mask=prompt_mask.long(),
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    num_beams=1,
                    eos_token_id=list(stop_ids),
                    pad_token_id=stop_ids[0],
                    **sampling,
                ),
            )
        finally:
            for part, training in modes:
                part.training = training
        stops = set(stop_ids)
        return [_until(row, stops) for row in out.tolist()]

    def _dtype(self) -> torch.dtype:
        return self.embedding_weight.dtype

    def _continue(
        self, prefix: PrefixCache, rows: Tensor, embeds: Tensor, mask: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """(N, M, D) embeddings after cached beginnings -> (N, M, D) final hidden states."""
        whole = torch.cat([prefix.mask[rows], mask], dim=1)
        positions = (whole.long().cumsum(1) - 1).clamp_min(0)[:, prefix.length :]
        return self._decode(embeds, whole, positions, cache or prefix.rows(rows))

    def _logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) fp32 logits."""
        logits: Tensor = self._logit_transform()(self.causal_lm.get_output_embeddings()(hidden).float())
        return logits

    def _decode(
        self, embeds: Tensor, attention_mask: Any, positions: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D) final hidden states; a cache is read and filled."""
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            attention_mask = attention_mask.long()
        out = self.causal_lm.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _continued(
        self, prompt_embeds: Tensor, prompt_mask: Tensor, reply: Reply
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, mask and positions of prompts with one reply each; a reply's last token predicts
        nothing and is not fed."""
        embeds = torch.cat([prompt_embeds.to(self._dtype()), self.embed(reply.ids[:, :-1])], dim=1)
        mask = torch.cat([prompt_mask, reply.mask[:, :-1]], dim=1)
        return embeds, mask, (mask.long().cumsum(1) - 1).clamp_min(0)

    @contextmanager
    def _recorded(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Layer -> (B, T, D) output of the last forward pass inside the context."""
        states: dict[int, Tensor] = {}
        modules = self.causal_lm.get_decoder().layers

        def recorder(number: int) -> Any:
            def record(module: nn.Module, inputs: object, output: Any) -> None:
                states[number] = output[0] if isinstance(output, tuple) else output

            return record

        handles = [modules[number].register_forward_hook(recorder(number)) for number in layers]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def _predictors(self, hidden: Tensor, reply: Reply, prompt_length: int, start: int) -> Tensor:
        """(B, R, D) states that predict a reply's tokens: the prompt's last, then those of its tokens, which
        were fed from `start` on."""
        rest = reply.ids.shape[1] - 1
        return torch.cat(
            [hidden[:, prompt_length - 1 : prompt_length], hidden[:, start : start + rest]], dim=1
        )

    def _score(self, hidden: Tensor, reply: Reply, prompt_length: int, start: int) -> Tensor:
        """(B, R) log-probabilities of one reply; arguments as in `_predictors`."""
        predictors = self._predictors(hidden, reply, prompt_length, start)
        return self._scatter(predictors[reply.mask], reply.ids[reply.mask], reply.mask)

    def _scatter(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """(N, D) hidden states and (N,) targets of the True positions of mask -> mask-shaped
        log-probabilities."""
        head = self.causal_lm.get_output_embeddings()
        if type(head) is nn.Linear:
            scores = token_log_probs(hidden, head.weight, head.bias, targets, self._logit_transform())
        else:  # a LoRA-wrapped or quantised head: its own forward, full logits of the scored positions only
            logits = self._logits(hidden)
            scores = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
        return torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_scatter(mask, scores)

    def _logit_transform(self) -> LogitTransform:
        scale = getattr(self.config, "logit_scale", None) or 1.0 / (
            getattr(self.config, "logits_scaling", None) or 1.0
        )
        return LogitTransform(
            scale=float(scale), softcap=getattr(self.config, "final_logit_softcapping", None)
        )

    def _branching_attention(
        self, mask: Tensor, positions: Tensor, prompt_length: int, lengths: Sequence[int], dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """Additive (B, 1, T, T) masks in which the replies see the prompt and themselves but not each
        other."""
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
            return torch.full((batch, 1, total, total), floor, dtype=dtype, device=mask.device).masked_fill(
                seen[:, None], 0.0
            )

        window = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if len(kinds) > 1:
            return {kind: additive(window if kind == "sliding_attention" else None) for kind in kinds}
        sliding = kinds == {"sliding_attention"} or (
            not kinds and getattr(self.config, "use_sliding_window", True)
        )
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
