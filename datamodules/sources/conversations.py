"""MT-Bench's files: two-turn questions, reference answers and the prompts that a judge is given.

Zheng et al. 2023 (arXiv 2306.05685), in FastChat's layout: `question.jsonl` (question_id, category, turns),
`reference_answer/gpt-4.jsonl` (question_id, choices[0].turns), `judge_prompts.jsonl` (name, system_prompt,
prompt_template).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.fields import checked
from datamodules.sources.files import Record, read_records

TURNS = 2
WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose answers are graded against a reference answer."""
MEND = "mend the line or remove it"


@dataclass(frozen=True)
class Conversation:
    """A question, the one that follows it, and the right answers to both where there are some."""

    key: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None
    where: str
    """`file:line`."""


@dataclass(frozen=True)
class GradingPrompt:
    """What a judge is told: a system message, and a text with fields in braces."""

    name: str
    system: str
    template: str

    def filled(self, values: Mapping[str, str]) -> str:
        """The template with its fields filled, in one pass: braces in what is filled in stay as they are.

        Raises: ValueError for a field of the template that has no value.
        """
        lacking = sorted(set(re.findall(r"\{(\w+)\}", self.template)) - values.keys())
        if lacking:
            raise ValueError(f"{self.name}: expected values for its fields, got none for {lacking}")
        return re.sub(r"\{(\w+)\}", lambda match: values[match.group(1)], self.template)


@checked
class MTBenchFiles:
    """The questions, the reference answers and the judge's prompts.

    Args:
        questions: jsonl file of the two-turn questions.
        references: jsonl file of the reference answers.
        prompts: jsonl file of the judge's prompts.
    """

    def __init__(self, questions: str, references: str, prompts: str) -> None:
        self.questions = questions
        self.references = references
        self.prompts = prompts

    def conversations(self) -> list[Conversation]:
        """In file order. Raises: ValueError naming file and line of what is no question, of two with one id,
        and of one that needs a reference answer and has none."""
        references = self._references()
        found: dict[str, Conversation] = {}
        for line, record in read_records(self.questions):
            where = f"{self.questions}:{line}"
            key, category = str(record.get("question_id", "")), record.get("category")
            turns = _two_texts(record.get("turns"), "turns", where)
            if not key or not isinstance(category, str) or not category:
                raise ValueError(f"{where}: expected question_id and category, got {sorted(record)}; {MEND}")
            if key in found:
                raise ValueError(f"{where}: the id {key!r} is that of {found[key].where} too; rename one")
            if category in WITH_REFERENCE and key not in references:
                raise ValueError(
                    f"{where}: the {category} question {key!r} has no reference answer in {self.references}; "
                    "add it"
                )
            own = references.get(key) if category in WITH_REFERENCE else None
            found[key] = Conversation(key, category, turns, own, where)
        if not found:
            raise ValueError(f"{self.questions}: expected questions, got an empty file; fetch it again")
        return list(found.values())

    def grading_prompts(self) -> dict[str, GradingPrompt]:
        """By name. Raises: ValueError naming file and line of what is none, or the name that is missing."""
        found: dict[str, GradingPrompt] = {}
        for line, record in read_records(self.prompts):
            texts = [record.get(name) for name in ("name", "system_prompt", "prompt_template")]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"{self.prompts}:{line}: expected the texts name, system_prompt and prompt_template, got "
                    f"{sorted(record)}; {MEND}"
                )
            name, system, template = map(str, texts)
            found[name] = GradingPrompt(name, system, template)
        wanted = [prompt_name(turn, math) for turn in range(TURNS) for math in (False, True)]
        lacking = [name for name in wanted if name not in found]
        if lacking:
            raise ValueError(
                f"{self.prompts}: expected a prompt {lacking[0]!r}, got {sorted(found)}; fetch it again"
            )
        return found

    def _references(self) -> dict[str, tuple[str, str]]:
        found = {}
        for line, record in read_records(self.references):
            where = f"{self.references}:{line}"
            found[str(record.get("question_id"))] = _two_texts(
                _first_choice(record), "choices[0].turns", where
            )
        return found


def prompt_name(turn: int, with_reference: bool) -> str:
    """Of the single-answer grading prompt for a turn (0 or 1)."""
    return f"single-{'math-' if with_reference else ''}v1{'-multi-turn' if turn else ''}"


def _first_choice(record: Record) -> Any:
    choices = record.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first.get("turns") if isinstance(first, dict) else None


def _two_texts(value: Any, name: str, where: str) -> tuple[str, str]:
    if (
        not isinstance(value, list)
        or len(value) != TURNS
        or not all(isinstance(text, str) and text.strip() for text in value)
    ):
        raise ValueError(f"{where}: expected two texts as {name}, got {value!r:.60}; {MEND}")
    return value[0], value[1]
