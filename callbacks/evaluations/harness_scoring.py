"""A model in memory behind the lm-evaluation-harness: what it is asked, and which choice it takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from callbacks.evaluations.harness import Task, listed, quiet
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.language_model import LanguageModel


@dataclass(frozen=True)
class Item:
    """One document as the harness asks it."""

    key: str
    category: str
    prompt: str
    """The context that is sent before every choice (before the first one, where each has its own)."""
    choices: list[str]
    expected: str
    requests: list[Any]
    """The harness's instances: a (context, continuation) pair a choice."""
    task: Any
    document: Any

    @property
    def sent(self) -> list[Any]:
        """All that a model sees of it, and what is right."""
        return [self.key, [list(request.args) for request in self.requests], self.choices, self.expected]


def ask(tasks: Sequence[Task], chat: Callable[..., str] | None) -> list[Item]:
    """The documents as the harness puts them, in order.

    Args:
        chat: renders messages by the model's chat template; null asks in plain text.
    """
    with quiet():
        return [item for task in tasks for item in _items(task, chat)]


class Scorer:
    """The harness's view of a model: log-probabilities of continuations, in batches of `batch_size`."""

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        from lm_eval.models.huggingface import HFLM

        # A copy of the tokenizer, since the harness gives it a pad token; of the model a view that is no
        # torch module, since it would tie the weights of one anew.
        with quiet():
            self.harness = HFLM(
                pretrained=_View(model),
                tokenizer=copy.deepcopy(model.chat.tokenizer),
                batch_size=batch_size,
            )

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages by the chat template."""
        return str(self.harness.apply_chat_template(messages, add_generation_prompt))

    def encoded(self, item: Item) -> list[int]:
        """The ids of the first continuation after its context."""
        context, continuation = item.requests[0].args[:2]
        return [int(i) for i in self.harness.tok_encode(context + continuation)]

    def outcomes(self, items: Sequence[Item], metric: str) -> list[tuple[str, bool]]:
        """The chosen choice of every item, and whether the harness counts it as right."""
        kind = self.harness.device.type
        active = torch.is_autocast_enabled(kind)
        # Otherwise the harness would turn the trainer's autocast off.
        self.harness.mixed_precision_dtype = torch.get_autocast_dtype(kind) if active else None
        requests = [request for item in items for request in item.requests]
        with quiet(), torch.no_grad():
            found = iter(self.harness.loglikelihood(requests, disable_tqdm=True))
        outcomes = []
        for item in items:
            scored = [next(found) for _ in item.requests]
            right = item.task.process_results(item.document, scored)[metric] == 1.0
            outcomes.append((_chosen(item.choices, scored, metric), bool(right)))
        return outcomes


class _View:
    """What the harness reads of a model."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.config = causal_lm(model.module).config
        self.device = model.device

    def __call__(self, ids: torch.Tensor) -> Any:
        return self._model.module(input_ids=ids)


def _chosen(choices: list[str], scored: Sequence[tuple[float, bool]], metric: str) -> str:
    values = np.array([log_prob for log_prob, _ in scored[: len(choices)]])
    lengths = np.array([float(len(choice)) for choice in choices])
    return choices[int(np.argmax(values / lengths if metric == "acc_norm" else values))]


def _items(own: Task, chat: Callable[..., str] | None) -> Iterator[Item]:
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    task = own.task
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    documents = task.eval_docs
    for index, key, category in own.documents:
        document = documents[index]
        context = task.fewshot_context(
            document,
            num_fewshot=task.config.num_fewshot,
            system_instruction=None,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=True,
            chat_template=chat,
            gen_prefix=task.doc_to_prefix(document),
        )
        requests = task.construct_requests(
            doc=document,
            ctx=context,
            metadata=(own.name, index, 1),
            apply_chat_template=chat is not None,
            chat_template=chat,
        )
        choices = list(task.doc_to_choice(document))
        gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        rights = [choices[g] if isinstance(g, int) else str(g) for g in listed(gold)]
        yield Item(
            f"{own.name}/{key}",
            category,
            requests[0].args[0],
            choices,
            " or ".join(rights),
            requests,
            task,
            document,
        )
