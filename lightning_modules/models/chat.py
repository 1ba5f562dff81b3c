"""Language models one talks to, as attackers and judges: a loaded model, or an endpoint that speaks the
OpenAI chat protocol."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from datamodules.contents import fingerprint
from datamodules.fields import Count, NonNegative, NonNegativeInt, Positive, Share, checked
from datamodules.text.chat_format import ChatFormat
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig, load_model
from lightning_modules.models.requests import Decoding, Request


class ChatModel(Protocol):
    """Replies to requests; `name` and `revision` are stored with everything it judged or wrote.

    One whose replies depend on more may have `decides`: what else, for `settings_digest`.
    """

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str: ...

    def replies(self, requests: Sequence[Request], seed: int = 0) -> list[str]:
        """One reply each; where they are sampled, the same seed and requests give the same replies."""
        ...

    def clip(self, text: str, max_tokens: int) -> str:
        """The text's first so many tokens."""
        ...

    def escape(self, text: str) -> str:
        """The text with everything broken up that this model would read as the end or the start of a turn."""
        ...


FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""Seconds before another attempt after an answer that is no chat completion."""


@dataclass(frozen=True)
class Unanswered:
    """A request that got no reply."""

    reason: str


INSTRUCTION_MARKS = (
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<|eot_id|>",
    "<|end|>",
)
"""Turn marks of common templates, some of which are ordinary text to their tokenizers."""


def escape_marks(text: str) -> str:
    """Break up common turn marks by a space after their first character."""
    for mark in INSTRUCTION_MARKS:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


@checked
class LocalChat:
    """A model loaded on first use in this process, in evaluation mode.

    Args:
        base: the model.
        tokenizer: its tokenizer and chat template.
        max_new_tokens: longest reply.
        temperature: 0 decodes greedily.
        top_p: nucleus of the sampling where the temperature is above 0.
        max_rows: requests per batch.
        device: where the model goes; null takes a GPU if there is one.
    """

    def __init__(
        self,
        base: ModelConfig,
        tokenizer: TokenizerConfig,
        max_new_tokens: Count = 256,
        temperature: NonNegative = 0.0,
        top_p: Share = 1.0,
        max_rows: Count = 16,
        device: str | None = None,
    ) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.max_rows = max_rows
        self.device = device
        self._loaded: LanguageModel | None = None

    @property
    def name(self) -> str:
        return self.base.name_or_path

    @cached_property
    def revision(self) -> str:
        """The hub's; of a folder here, a digest of what it held when it was first asked for."""
        named = self.base.name_or_path
        return self.base.revision or (fingerprint(named) if Path(named).is_dir() else None) or "unpinned"

    @property
    def decides(self) -> list[object]:
        """Weights, template and decoding."""
        return [self.base, self.tokenizer, self.max_new_tokens, self.temperature, self.top_p]

    @property
    def language_model(self) -> LanguageModel:
        if self._loaded is None:
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            weights = load_model(self.base).eval().requires_grad_(False).to(device)
            self._loaded = LanguageModel(weights, chat=ChatFormat(load_tokenizer(self.tokenizer)))
        return self._loaded

    def replies(self, requests: Sequence[Request], seed: int = 0) -> list[str]:
        """One reply each. Raises: ValueError where a request does not fit the chat template."""
        decoding = Decoding(self.max_new_tokens, self.temperature, self.top_p, self.max_rows)
        return self.language_model.reply(requests, decoding, seed)

    def clip(self, text: str, max_tokens: int) -> str:
        ids = self.language_model.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= max_tokens else self.language_model.chat.decode(ids[:max_tokens])

    def escape(self, text: str) -> str:
        return self.language_model.chat.neutralised(escape_marks(text))


@checked
class Endpoint:
    """A server that speaks the OpenAI chat-completions protocol (needs the extra `endpoint`).

    Args:
        base_url: address up to and including `/v1`.
        model: the server's name of the model.
        api_key_env: environment variable that holds the key; a server that asks for none needs none.
        max_new_tokens: longest reply.
        temperature: sampling temperature.
        top_p: nucleus of the sampling.
        timeout: seconds to wait for a reply.
        max_retries: further attempts after a failed request.
        parallel: requests under way at once.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        max_new_tokens: Count = 512,
        temperature: NonNegative = 0.0,
        top_p: Share = 1.0,
        timeout: Positive = 120.0,
        max_retries: NonNegativeInt = 4,
        parallel: Count = 8,
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ValueError("Endpoint: needs the openai package, which is not installed; pip install openai")
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"Endpoint.base_url: expected http:// or https://, got {base_url!r}")
        self.base_url = base_url
        self.model = model
        self.api_key_env = api_key_env
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.timeout = timeout
        self.max_retries = max_retries
        self.parallel = parallel

    @property
    def name(self) -> str:
        return self.model

    @property
    def revision(self) -> str:
        return self.base_url

    @property
    def decides(self) -> list[object]:
        """The decoding that is asked for."""
        return [self.max_new_tokens, self.temperature, self.top_p]

    def replies(self, requests: Sequence[Request], seed: int = 0) -> list[str]:
        """One reply each; not every server takes a seed, so none is sent.

        Raises: ConnectionError once a request has failed `max_retries` times.
        """
        found = self.answers(requests)
        failed = next((own for own in found if isinstance(own, Unanswered)), None)
        if failed is not None:
            raise ConnectionError(failed.reason)
        return [own for own in found if isinstance(own, str)]

    def answers(self, requests: Sequence[Request]) -> list[str | Unanswered]:
        """One reply each, or why there is none once it has failed `max_retries` times (pauses between them
        grow); a request that fails leaves the others alone."""
        from openai import OpenAI, OpenAIError

        key = os.environ.get(self.api_key_env) or "none"
        with OpenAI(
            base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=self.max_retries
        ) as client:

            def ask(request: Request) -> str | Unanswered:
                messages = _messages(request)
                problem = ""
                for attempt in range(1 + self.max_retries):
                    if attempt:
                        time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)))
                    try:
                        answer = client.chat.completions.create(
                            model=self.model,
                            messages=messages,  # type: ignore[arg-type]
                            max_tokens=self.max_new_tokens,
                            temperature=self.temperature,
                            top_p=self.top_p,
                        )
                    except OpenAIError as error:
                        problem = str(error) or type(error).__name__
                        break  # The client has tried again itself, where that could help.
                    said = _said(answer)
                    if said is not None:
                        return said
                    problem = f"expected a chat completion, got {answer!r:.80}"
                return Unanswered(
                    f"the endpoint {self.base_url} failed: {problem}; check base_url, model and "
                    f"${self.api_key_env}"
                )

            # A line a request is the client's habit, not what a user of an evaluation wants to read.
            for name in ("httpx", "httpx2"):
                logging.getLogger(name).setLevel(logging.WARNING)
            with ThreadPoolExecutor(self.parallel) as pool:
                return list(pool.map(ask, requests))

    def clip(self, text: str, max_tokens: int) -> str:
        """By words: a server does not show its tokenizer, and a word is at least one token."""
        words = text.split(" ")
        return text if len(words) <= max_tokens else " ".join(words[:max_tokens])

    def escape(self, text: str) -> str:
        return escape_marks(text)


def decides(model: ChatModel) -> list[object]:
    """What a model's replies depend on besides its revision and the requests."""
    found: list[object] = getattr(model, "decides", [])
    return found


def ask_each(model: ChatModel, requests: Sequence[Request]) -> list[str | Unanswered]:
    """One reply each, or why there is none where the model is one that may be out of reach."""
    answers = getattr(model, "answers", None)
    found: list[str | Unanswered] = list(model.replies(requests)) if answers is None else answers(requests)
    return found


def _said(answer: object) -> str | None:
    """The text of a chat completion, '' for an empty one; None where it is none: a proxy's error page, say,
    comes as a text or without choices."""
    choices = getattr(answer, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    if message is None:
        return None
    content = getattr(message, "content", None)
    return content if isinstance(content, str) else ""


def _messages(request: Request) -> list[dict[str, str]]:
    messages = [] if request.system is None else [{"role": "system", "content": request.system}]
    for user, assistant in request.history:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    if request.prefill:
        # Some servers continue a last assistant message, others answer anew, none says which.
        raise ValueError(
            f"Endpoint: expected requests without a prefill, got {request.prefill[:40]!r}; the protocol "
            "cannot make a reply begin with a text"
        )
    return [*messages, {"role": "user", "content": request.text}]
