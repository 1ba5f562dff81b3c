"""Small files in MT-Bench's layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.sources.conversations import MTBenchFiles, prompt_name

CATEGORIES = {"81": "writing", "101": "math", "111": "coding"}


def lines(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def files(folder: Path, **changed: list[dict[str, Any]]) -> MTBenchFiles:
    """Three questions, two of them with references, and short prompts in the authors' layout."""
    folder.mkdir(exist_ok=True)
    questions = [
        {"question_id": int(key), "category": name, "turns": [f"ask {key} first", f"ask {key} second"]}
        for key, name in CATEGORIES.items()
    ]
    references = [
        {"question_id": int(key), "choices": [{"turns": [f"right {key} first", f"right {key} second"]}]}
        for key, name in CATEGORIES.items()
        if name != "writing"
    ]
    one, two = (
        "GRADE {question} SAID {answer}",
        "GRADE {question_1} {question_2} SAID {answer_1} | {answer_2}",
    )
    prompts = [
        {"name": prompt_name(turn, math), "system_prompt": f"system {turn}", "prompt_template": text}
        for turn, math, text in (
            (0, False, one),
            (0, True, f"{one} RIGHT {{ref_answer_1}}"),
            (1, False, two),
            (1, True, f"{two} RIGHT {{ref_answer_1}} {{ref_answer_2}}"),
        )
    ]
    given = {"questions": questions, "references": references, "prompts": prompts} | changed
    return MTBenchFiles(**{name: lines(folder / f"{name}.jsonl", own) for name, own in given.items()})
