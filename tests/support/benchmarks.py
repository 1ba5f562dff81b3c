"""Files of questions in the layouts of the public ones, and a session that asks them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from callbacks.evaluations.benchmark import Benchmark, BenchmarkEvaluation
from callbacks.evaluations.session import Place, Session
from datamodules.sources.questions import ArcQuestions
from lightning_modules.models.language_model import LanguageModel
from tests.conftest import chat_model

WORDS = ["blue", "stone", "a long river", "cloud", "the small garden", "fire", "seven", "bread and salt"]


def arc_file(path: Path, n: int = 12, seed: int = 0) -> str:
    """Questions with choices of different lengths, in the hub's layout."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for i in range(n):
            text = draw.sample(WORDS, 4)
            record = {
                "id": f"q{i}",
                "question": f"What goes with {draw.choice(WORDS)} and {i}?",
                "choices": {"text": text, "label": list("ABCD")},
                "answerKey": draw.choice("ABCD"),
            }
            stream.write(json.dumps(record) + "\n")
    return str(path)


def arc_easy(folder: Path) -> Benchmark:
    return Benchmark("arc_easy", ArcQuestions(arc_file(folder / "arc.jsonl")), batch_size=5)


def mmlu_folder(path: Path) -> str:
    for split, n in (("test", 3), ("dev", 2)):
        (path / split).mkdir()
        for subject in ("anatomy", "virology"):
            rows = [f"{split} {subject} {i}?,blue,stone,fire,cloud,{i}" for i in range(n)]
            text = "\n".join(["question,choice0,choice1,choice2,choice3,answer", *rows]) + "\n"
            (path / split / f"{subject}_{split}.csv").write_text(text, encoding="utf-8")
    return str(path)


def opened(folder: Path, *benchmarks: Benchmark, model: LanguageModel | None = None, **place: Any) -> Session:
    """A session of `thundercat test`; the questions need no evaluation data."""
    own = Place(model or chat_model(), folder, "test", 0, **place)
    return Session(own, None, [BenchmarkEvaluation(list(benchmarks))])  # type: ignore[arg-type]


def measured(session: Session) -> dict[str, bool]:
    """Whether each example is right."""
    for job in session.jobs:
        session.do(job)
    return {row.example: row.verdict(next(iter(row.verdicts))) for row in session.rows}
