"""What a defence is: hyperparameters in the constructor, a model and requests at call time, an answer each
with what it cost. `Defended` puts one around a model as a `Replier`.

A defence draws from its seed and from what it is asked, so that its answer does not depend on batch-mates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.batch import EvaluationBatch
from datamodules.settings import settings_digest
from datamodules.text.spans import Attackable, attackable_in
from lightning_modules.attacks.base import AttackedPrompt
from lightning_modules.models.language_model import Attacked, LanguageModel
from lightning_modules.models.requests import GREEDY, Decoding, Request

ROWS_AT_ONCE = 64
"""Requests per batch where a defence asks for many."""


@dataclass(frozen=True)
class Answer:
    """A reply through a defence, and what it cost."""

    reply: str
    queries: int
    """Calls of a model: replies generated, texts scored."""
    tokens: int
    """Tokens that those calls read and wrote."""
    stopped: bool = False
    """The defence has answered itself, in the model's place."""
    bypassed: bool = False
    """The attack entered behind the defence, or behind the one within it: an embedding has no text that it
    could look at."""
    guaranteed: bool | None = None
    """Whether this request stays refused whatever an attack within the defence's threat model adds; None
    where it promises nothing of the kind."""


class Defence(Protocol):
    """Answers requests with a model's help. To act on attacks that have no text it also has `embedded` (see
    `ActsOnEmbeddings`); to be attacked adaptively, `seen_through` (attacks/suffix/through_defence.py)."""

    @property
    def name(self) -> str: ...

    def answers(
        self, model: LanguageModel, requests: Sequence[Request], decoding: Decoding, seed: int
    ) -> list[Answer]:
        """One answer each; the same seed and requests give the same answers, in any batches."""
        ...


@dataclass(frozen=True)
class Marked:
    """Prompts that an attack has perturbed as embeddings, with what is known of them."""

    attacked: Attacked
    attackable: Bool[Tensor, "batch prompt"]
    """The user's part of each prompt, with what an attack put into it."""
    requests: Sequence[Request]
    """What was asked, before the attack."""

    @property
    def prompt_mask(self) -> Bool[Tensor, "batch prompt"]:
        return self.attacked.prompt_mask

    @property
    def forced(self) -> Sequence[Sequence[int]]:
        return self.attacked.forced

    def applied(self, model: LanguageModel) -> AbstractContextManager[Float[Tensor, "batch prompt dim"]]:
        return self.attacked.applied(model)


@runtime_checkable
class ActsOnEmbeddings(Protocol):
    """A defence that also acts where the attack enters as embeddings."""

    def embedded(
        self, model: LanguageModel, prompts: Marked, decoding: Decoding, seed: int
    ) -> list[Answer]: ...


@dataclass(frozen=True)
class Defended:
    """A model behind a defence: a Replier that also says what its answers cost."""

    model: LanguageModel
    defence: Defence

    def answers(
        self, prompts: Sequence[Request] | Marked, decoding: Decoding = GREEDY, seed: int = 0
    ) -> list[Answer]:
        """One answer each; attacks on embeddings get past a defence that looks at texts."""
        if isinstance(prompts, Sequence):
            return self.defence.answers(self.model, prompts, decoding, seed)
        if isinstance(self.defence, ActsOnEmbeddings):
            return self.defence.embedded(self.model, prompts, decoding, seed)
        replies = self.model.reply(prompts, decoding, seed)
        tokens = spent(self.model, prompts.requests, replies)
        return [Answer(reply, 1, count, bypassed=True) for reply, count in zip(replies, tokens, strict=True)]

    def reply(
        self, prompts: Sequence[Request] | Marked, decoding: Decoding = GREEDY, seed: int = 0
    ) -> list[str]:
        """The replies alone."""
        return [answer.reply for answer in self.answers(prompts, decoding, seed)]


def requests_of(
    batch: EvaluationBatch, attacked: AttackedPrompt | None = None, attackable: Attackable = "user"
) -> list[Request]:
    """Prompts as a user sends them: what an attack has written in the place of the user's texts, or of the
    documents where it may write those."""
    texts: Sequence[str] = batch.prompts
    documents: Sequence[str | None] = batch.documents or [None] * len(batch)
    if attacked is not None and attacked.texts:
        sent = [
            (text, own) if attackable_in(attackable, document is not None) == "data" else (own, document)
            for text, document, own in zip(texts, documents, attacked.texts, strict=True)
        ]
        texts, documents = [text for text, _ in sent], [document for _, document in sent]
    histories = (attacked.histories if attacked is not None else ()) or batch.histories
    return [
        Request(
            text,
            batch.systems[i] if batch.systems else None,
            tuple(histories[i]) if histories else (),
            data=document,
        )
        for i, (text, document) in enumerate(zip(texts, documents, strict=True))
    ]


def without_documents(owner: str, requests: Sequence[Request]) -> None:
    """Raises: ValueError for a request with a document, which a defence that reads the user's text alone
    would let by unseen."""
    if any(request.data is not None for request in requests):
        raise ValueError(
            f"{owner}: expected requests without a document, since it reads the user's text alone, got one "
            "with a document; take a learned filter, a reply filter or a reminder"
        )


def label(defence: Defence | None) -> str:
    """`name-digest` of a defence and all its settings, as results carry it; '' for none."""
    return "" if defence is None else f"{defence.name}-{settings_digest(defence)}"


def rng_of(seed: int, number: int, request: Request) -> torch.Generator:
    """The random state of one request: of the defence's seed, the caller's and what is asked, never of its
    place in a batch."""
    around: tuple[object, ...] = request.system, request.history, request.prefill
    if request.data is not None:
        around = *around, request.data
    words = [str(seed), str(number), repr(around), request.text]
    digest = hashlib.blake2b("\0".join(words).encode(errors="surrogatepass"), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def spent(model: LanguageModel, requests: Sequence[Request], replies: Sequence[str]) -> list[int]:
    """Tokens of each prompt and its reply, with the template's."""
    prompts = [len(request.tokens(model.chat).ids) for request in requests]
    # No tokenizer takes half a surrogate pair.
    written = model.chat.encode_batch([reply.encode(errors="replace").decode() for reply in replies])
    return [read + len(own) for read, own in zip(prompts, written, strict=True)]


def counts(model: LanguageModel, request: Request, answer: Answer) -> dict[str, int]:
    """What an answer cost, as rows hold it; `plain_tokens` are those of the request and this reply alone."""
    found = {
        "queries": answer.queries,
        "tokens": answer.tokens,
        "plain_tokens": spent(model, [request], [answer.reply])[0],
        "stopped": int(answer.stopped),
        "bypassed": int(answer.bypassed),
    }
    return found if answer.guaranteed is None else {**found, "guaranteed": int(answer.guaranteed)}


def marked(model: LanguageModel, requests: Sequence[Request], attacked: Attacked) -> Marked:
    """Attacked prompts with their user's part, its document included: what stands between the template's
    beginning and its end, which an attack leaves as they are."""
    mask = torch.zeros_like(attacked.prompt_mask)
    width = mask.shape[1]
    for row, own in enumerate(requests):
        tokens = own.tokens(model.chat)
        user = [
            one or two for one, two in zip(tokens.attackable("user"), tokens.attackable("data"), strict=True)
        ]
        before, after = user.index(True), user[::-1].index(True)
        forced = len(attacked.forced[row]) if attacked.forced else 0
        begin = width - int(attacked.prompt_mask[row].sum())
        mask[row, begin + before : width - after - forced] = True
    return Marked(attacked, mask, tuple(requests))
