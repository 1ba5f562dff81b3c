"""The library judgezoo 0.1.9 as its callers meet it: its names, constructors, arguments, results and checks.

In its models' place are answers by reply.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

Chat = list[dict[str, str]]


class HarmBenchClassifier(Enum):
    LLAMA_2_13B = "cais/HarmBench-Llama-2-13b-cls"
    MISTRAL_7B = "cais/HarmBench-Mistral-7b-val-cls"


class Library:
    """What its judges answer by a reply's text, and what they were asked with."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[list[Chat], ...]] = []
        self.made: list[Judge] = []


class Judge:
    """A judge whose model gives a probability of harm, made without arguments, as llama_guard_3 is."""

    library: Library
    keys = ("p_harmful",)

    def __init__(self) -> None:
        self.library.made.append(self)

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> Judge:
        if name not in NAMES:
            raise ValueError(f"Unknown judge {name}")
        return NAMES[name](**kwargs)

    def judge(self, chats: list[Chat]) -> dict[str, list[Any]]:
        values = [self.library.answers[chat[-1]["content"]] for chat in chats]
        return dict.fromkeys(self.keys, values)

    def __call__(self, chats: list[Chat], *args: list[Chat], verbose: bool = False) -> Any:
        self.library.asked.append((chats, *args))
        if not chats:
            return []
        if any(len(own) != len(chats) for own in args):
            raise ValueError("All inputs must have the same length.")
        for own in (chats, *args):
            assert all([turn["role"] for turn in chat] == ["user", "assistant"] for chat in own)
        found = self.judge(chats, *args)
        assert all(len(values) == len(chats) for values in found.values())
        return found


class HarmBenchJudge(Judge):
    def __init__(self, classifier: HarmBenchClassifier = HarmBenchClassifier.LLAMA_2_13B) -> None:
        super().__init__()
        self.weights = classifier.value


class PromptBasedJudge(Judge):
    """One that asks a general model: the hub's, or an API whose key must be there."""

    keys: tuple[str, ...] = ("p_harmful", "rating")

    def __init__(
        self,
        use_local_model: bool | None = None,
        local_foundation_model: str | None = None,
        remote_foundation_model: str | None = None,
    ) -> None:
        super().__init__()
        if not use_local_model and not os.getenv("OPENAI_API_KEY"):
            raise ValueError(
                "OPENAI_API_KEY environment variable not found. Please set it in your environment."
            )


class PAIRJudge(PromptBasedJudge):
    def judge(self, chats: list[Chat], target_chats: list[Chat]) -> dict[str, list[Any]]:
        assert len(target_chats) == len(chats)
        return super().judge(chats)


class StrongRejectRubricJudge(PromptBasedJudge):
    """Leaves out the answers that it cannot read."""

    keys = ("p_harmful", "refusal_score", "convincing_score", "specific_score")

    def judge(self, chats: list[Chat]) -> dict[str, list[Any]]:
        return {
            key: [value for value in values if value is not None]
            for key, values in super().judge(chats).items()
        }


class XSTestJudge(PromptBasedJudge):
    keys = ("category",)


class IntentionAnalysisJudge(PromptBasedJudge):
    """Gives both a probability and a category."""

    keys = ("p_harmful", "category")


class JailbreakBenchJudge(PromptBasedJudge):
    """In a module of its own, without a name in `from_name`."""

    keys = ("p_harmful",)


class Ratings(Judge):
    """Of no version so far: without a probability."""

    keys = ("rating",)


NAMES: dict[str, Callable[..., Judge]] = {
    "harmbench": HarmBenchJudge,
    "intention_analysis": IntentionAnalysisJudge,
    "llama_guard_3": Judge,
    "pair": PAIRJudge,
    "ratings": Ratings,
    "strong_reject_rubric": StrongRejectRubricJudge,
    "xstest": XSTestJudge,
}


def installed(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Put the library among the installed modules, with a key for its API."""
    parts = {
        "judgezoo": {"Judge": Judge},
        "judgezoo.harmbench": {"HarmBenchClassifier": HarmBenchClassifier},
        "judgezoo.jailbreakbench": {"JailbreakBenchJudge": JailbreakBenchJudge},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.9")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(Judge, "library", library := Library(), raising=False)
    return library
