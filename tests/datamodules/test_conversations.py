"""MT-Bench's files: what is none of them is named, with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datamodules.sources.conversations import prompt_name
from tests.support.mt_bench_files import files


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"questions": []}, r"questions\.jsonl: expected questions, got an empty file"),
        (
            {"questions": [{"question_id": 1, "category": "x", "turns": ["one"]}]},
            r"questions\.jsonl:1: expected two texts as turns, got \['one'\]",
        ),
        ({"questions": [{"question_id": 1, "turns": ["a", "b"]}]}, "expected question_id and category"),
        (
            {"questions": [{"question_id": 1, "category": "x", "turns": ["a", "b"]}] * 2},
            r"questions\.jsonl:2: the id '1' is that of .*questions\.jsonl:1 too",
        ),
        ({"references": []}, r"questions\.jsonl:2: the math question '101' has no reference answer"),
        (
            {"references": [{"question_id": 101, "choices": []}]},
            r"references\.jsonl:1: expected two texts as choices\[0\]\.turns",
        ),
    ],
)
def test_what_is_no_question_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files(tmp_path, **changed).conversations()


def test_a_prompt_that_is_missing_or_asks_for_more_is_named(tmp_path: Path) -> None:
    one = {"name": "single-v1", "system_prompt": "s", "prompt_template": "{question} {unknown}"}
    with pytest.raises(ValueError, match=r"expected a prompt 'single-math-v1', got \['single-v1'\]"):
        files(tmp_path, prompts=[one]).grading_prompts()
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: expected the texts name"):
        files(tmp_path, prompts=[{"name": "single-v1"}]).grading_prompts()
    every = [one | {"name": prompt_name(turn, math)} for turn in (0, 1) for math in (False, True)]
    prompt = files(tmp_path, prompts=every).grading_prompts()["single-v1"]
    with pytest.raises(ValueError, match=r"single-v1: expected values .* none for \['unknown'\]"):
        prompt.filled({"question": "q"})
