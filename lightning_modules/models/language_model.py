"""The narrow view of a causal language model that attacks, losses and evaluations share: embed, score
replies, generate, reply.

Twelve public members; what only some callers need are functions of a `LanguageModel` beside this file:
`embeddings.py`, `logits.py`, `cached_scoring.py`, `hidden_states.py`. Architectures' quirks are handled in
`decoder.py` and `masks.py`; a missing pad token needs no handling, since masks say what is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig

from datamodules.batch import pad as padded
from datamodules.text.chat_format import ChatFormat, PromptTokens
from lightning_modules.models.adapters import merged_adapters
from lightning_modules.models.conversations import label_log_probs
from lightning_modules.models.decoder import causal_lm, decode, text_config, weight_dtype
from lightning_modules.models.generation import generated_ids
from lightning_modules.models.layout import branching_layout
from lightning_modules.models.modes import evaluating, seeded
from lightning_modules.models.norms import short_norms
from lightning_modules.models.reply import Reply, score
from lightning_modules.models.requests import GREEDY, Decoding, Request
from lightning_modules.models.sharding import ShardedWeights

T = TypeVar("T")


class Attacked(Protocol):
    """Prompts as an attack left them, ready for a model."""

    @property
    def prompt_mask(self) -> Bool[Tensor, "batch prompt"]: ...

    @property
    def forced(self) -> Sequence[Sequence[int]]:
        """Ids that each reply is made to begin with (they end the prompts already); empty where none are."""
        ...

    def applied(self, model: LanguageModel) -> AbstractContextManager[Float[Tensor, "batch prompt dim"]]:
        """Embeddings of the prompts; the rest of the perturbation is in place while the context lasts."""
        ...


@dataclass(frozen=True)
class Encoded:
    """Prompts that are ids already, not attacked."""

    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    forced: tuple[tuple[int, ...], ...] = ()

    def applied(self, model: LanguageModel) -> AbstractContextManager[Float[Tensor, "batch prompt dim"]]:
        return nullcontext(model.embed(self.prompt_ids))


class Replier(Protocol):
    """Whatever answers: a language model, or a defence around one. Evaluations generate through this."""

    def reply(
        self, prompts: Sequence[Request] | Attacked, decoding: Decoding = GREEDY, seed: int = 0
    ) -> list[str]:
        """One reply each, with what it was made to begin with; the same seed and prompts give the same
        replies."""
        ...


class LanguageModel:
    """A causal LM, plain or wrapped by PEFT.

    Args:
        module: the Hugging Face model or PeftModel; it is not copied.
        chat: the model's chat format; attacks that write text need it, those on embeddings do not.
        merge_adapters: merge fp32 LoRA weights while the model is frozen for an attack (exact in fp32; below
            only with `merge_rounded`).
        merge_rounded: merge below fp32 too, where the sum is rounded.
        share_prompt: score several replies to one prompt in a single forward pass that computes the prompt
            once.
        sharded: how its weights are gathered, where they lie in pieces.
        compiled: score an embedding attack's rows by a graph of torch.compile's.
    """

    def __init__(
        self,
        module: nn.Module,
        chat: ChatFormat | None = None,
        merge_adapters: bool = True,
        share_prompt: bool = True,
        merge_rounded: bool = False,
        sharded: ShardedWeights | None = None,
        compiled: bool = False,
    ) -> None:
        self.module = module
        self._chat = chat
        self._merge_adapters = merge_adapters
        self._merge_rounded = merge_rounded
        self._share_prompt = share_prompt
        self.sharded = sharded
        self.compiled = compiled

    @property
    def device(self) -> torch.device:
        return next(causal_lm(self.module).get_input_embeddings().parameters()).device

    @property
    def chat(self) -> ChatFormat:
        """The model's chat format. Raises: ValueError where none was given."""
        if self._chat is None:
            raise ValueError(
                "expected a model with a chat format for an attack that writes text, got none; set "
                "LanguageModel(model, chat=...)"
            )
        return self._chat

    def embed(self, ids: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token dim"]:
        """Embeddings as the decoder stack receives them (Gemma scales inside its embedding module)."""
        embedded: Tensor = causal_lm(self.module).get_input_embeddings()(ids)
        return embedded

    def outer_pass(self, losses: Callable[[], T]) -> T:
        """Run what a training loss is computed by."""
        return losses() if self.sharded is None else self.sharded.outer_pass(losses)

    def gathered(self) -> AbstractContextManager[None]:
        """All weights whole while the context lasts, so that this process may score and generate without the
        others."""
        return nullcontext() if self.sharded is None else self.sharded.gathered()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode, no weight needs a gradient, fp32 adapters merged, norms with a shorter backward
        pass, all weights gathered; everything is as before on leaving."""
        with self.gathered(), self._frozen():
            yield

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        # Walked once: a deep model with adapters has thousands of parts.
        parts = list(self.module.modules())
        own = {id(p): p for part in parts for p in part._parameters.values() if p is not None}
        learning = [parameter for parameter in own.values() if parameter.requires_grad]
        # A compiled graph has short passes of its own, and would be made again for norms that were replaced.
        with evaluating(parts), short_norms(() if self.compiled else parts):
            for parameter in learning:
                parameter.requires_grad_(False)
            try:
                with merged_adapters(parts, self._merge_adapters, self._merge_rounded):
                    yield
            finally:
                for parameter in learning:
                    parameter.requires_grad_(True)

    def reply_log_probs(
        self,
        prompt_embeds: Float[Tensor, "batch prompt dim"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        *replies: Reply,
    ) -> tuple[Float[Tensor, "batch reply"], ...]:
        """Log-probability of every reply token given the prompt and the reply's earlier tokens.

        Args:
            prompt_embeds: left-padded, possibly perturbed; any float dtype.
            prompt_mask: False on padding.
            replies: one or more continuations of the same prompts.

        Returns: one fp32 tensor per reply, 0 where the reply's mask is False.
        """
        # FlashAttention's kernels take no mask of who sees whom.
        takes_masks = "flash" not in str(text_config(self.module)._attn_implementation)
        if len(replies) > 1 and not (self._share_prompt and takes_masks):
            return tuple(self.reply_log_probs(prompt_embeds, prompt_mask, reply)[0] for reply in replies)
        prompt_length = prompt_embeds.shape[1]
        fed = [reply.fed for reply in replies]
        positions, attention = branching_layout(self.module, prompt_mask, [part.mask for part in fed])
        prompt = prompt_embeds.to(weight_dtype(self.module))
        embeds = torch.cat([prompt, *(self.embed(part.ids) for part in fed)], dim=1)
        lengths = [part.ids.shape[1] for part in fed]
        hidden = decode(self.module, embeds, attention, positions, replies=len(replies))
        starts = [prompt_length + sum(lengths[:i]) for i in range(len(replies))]
        return tuple(
            score(self.module, hidden, reply, prompt_length, start, reply.scored)
            for reply, start in zip(replies, starts, strict=True)
        )

    def labelled_log_probs(
        self,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Bool[Tensor, "batch token"],
        labels: Int[Tensor, "batch token"],
        num_scored: int | None = None,
        common: int = 0,
    ) -> tuple[Float[Tensor, "batch token-1"], Bool[Tensor, "batch token-1"]]:
        """Log-probabilities of the labelled tokens of whole conversations.

        Args:
            input_ids: whole conversations, right-padded.
            attention_mask: True on their tokens.
            labels: the scored tokens' ids, -100 where nothing is scored.
            num_scored: how many they are, the first column aside, where the host knows.
            common: so many first tokens are the same in all rows, each before any that predicts a label.

        Returns: log-probabilities of labels[:, 1:] (0 where unscored) and the mask of scored ones.
        """
        # Of weights in pieces, all processes make the same passes, whatever their rows begin with.
        common = common if self.sharded is None else 0
        own = self.embed(input_ids), attention_mask, labels
        return label_log_probs(self.module, *own, num_scored, common)

    @torch.no_grad()
    def generate(
        self,
        prompt_embeds: Float[Tensor, "batch prompt dim"],
        prompt_mask: Bool[Tensor, "batch prompt"],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> list[list[int]]:
        """Ids that continue each prompt, cut before the first stop token; greedy unless the temperature is
        above 0."""
        sampled: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampled |= {"temperature": temperature, "top_p": top_p}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=1,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            **sampled,
        )
        parts = list(self.module.modules())
        # Never rounded, as attacks may have it, nor by autocast: what is evaluated is the model itself.
        merge = self._merge_adapters and not torch.is_autocast_enabled(self.device.type)
        with evaluating(parts), merged_adapters(parts, merge):
            rows = generated_ids(self.module, prompt_embeds, prompt_mask, settings)
        stops = set(stop_ids)
        return [_until(row, stops) for row in rows]

    @torch.no_grad()
    def reply(
        self, prompts: Sequence[Request] | Attacked, decoding: Decoding = GREEDY, seed: int = 0
    ) -> list[str]:
        """One reply each, with what it was made to begin with; the process's random state is left alone.

        Attacked prompts are one batch, as the attack saw them; requests are batched here.

        Raises: ValueError where a request does not fit the chat template.
        """
        if not isinstance(prompts, Sequence):
            return self._reply(prompts, decoding, seed)
        replies: list[str] = []
        for start in range(0, len(prompts), decoding.max_rows):
            part = encoded(self, prompts[start : start + decoding.max_rows])
            replies += self._reply(part, decoding, seed + start)
        return replies

    def _reply(self, prompts: Attacked, decoding: Decoding, seed: int) -> list[str]:
        with (
            evaluating(self.module.modules()),
            seeded(decoding, seed, self.device),
            prompts.applied(self) as embeds,
        ):
            generated = self.generate(
                embeds,
                prompts.prompt_mask,
                decoding.max_new_tokens,
                self.chat.stop_ids,
                decoding.temperature,
                decoding.top_p,
            )
        starts = prompts.forced or [()] * len(generated)
        return [self.chat.decode([*start, *ids]) for start, ids in zip(starts, generated, strict=True)]


def encoded(model: LanguageModel, requests: Sequence[Request]) -> Encoded:
    """Requests as one batch of ids, with what their replies are made to begin with.

    Raises: ValueError where one does not fit the chat template.
    """
    prompts = [request.tokens(model.chat) for request in requests]
    forced = [
        _prefill(model.chat, prompt, request.prefill) if request.prefill else []
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    rows = [prompt.ids + start for prompt, start in zip(prompts, forced, strict=True)]
    ids, mask = (tensor.to(model.device) for tensor in padded(rows, "left"))
    return Encoded(ids, mask, tuple(map(tuple, forced)))


def _prefill(chat: ChatFormat, prompt: PromptTokens, text: str) -> list[int]:
    """Ids of a text that a reply is made to begin with, as they continue the prompt."""
    ids, end = chat.reply(prompt, text), chat.end_of_turn
    if not end or ids[-len(end) :] != end:
        raise ValueError(
            f"Request.prefill: expected a text that ends apart from its turn, got {text[:40]!r}, whose last "
            "token the tokenizer merges with the end of turn; end the prefill elsewhere"
        )
    return ids[: -len(end)]


def _until(row: list[int], stops: set[int]) -> list[int]:
    return next((row[:i] for i, token in enumerate(row) if token in stops), row)
