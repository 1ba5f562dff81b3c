"""Multiple-choice questions from local files, as the documents of EleutherAI's lm-evaluation-harness: its own
tasks turn them into prompts and choices (callbacks/evaluations/benchmark.py).

Every benchmark comes in its own layout; a source here reads one, and says `file:line` of what is none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from datamodules.fields import checked
from datamodules.sources.files import Record, read_records

MEND = "mend the line or remove it"


@dataclass(frozen=True)
class Question:
    """One document with its place."""

    key: str
    """Unique within its subject: the file's own id where it has one, else the number from 0."""
    document: dict[str, Any]
    """In the schema of the benchmark's data set on the hub."""
    where: str
    """`file:line`."""
    subject: str = ""
    """The subject, where the benchmark has several; '' otherwise."""


class QuestionSource(Protocol):
    """Yields the documents of one benchmark."""

    def questions(self) -> list[Question]:
        """What is asked, in file order. Raises: ValueError naming file and line of what is no question."""
        ...

    def examples(self) -> list[Question]:
        """Solved questions for few-shot prompts; empty where there are none."""
        ...


@checked
class QuestionFile(ABC):
    """A question a line.

    Args:
        path: jsonl file of the questions.
        examples_path: jsonl file of solved questions for few-shot prompts; null for none.
    """

    def __init__(self, path: str, examples_path: str | None = None) -> None:
        self.path = path
        self.examples_path = examples_path

    @staticmethod
    @abstractmethod
    def document(record: Record, where: str) -> dict[str, Any]:
        """A line as the hub's document. Raises: ValueError naming `where`."""

    def questions(self) -> list[Question]:
        return _read(self.path, self.document)

    def examples(self) -> list[Question]:
        return _read(self.examples_path, self.document) if self.examples_path is not None else []


class ArcQuestions(QuestionFile):
    """ARC in the hub's layout (`choices: {text, label}`) or its authors' (`question: {stem, choices}`).

    Args:
        path: jsonl file of the questions.
        examples_path: jsonl file of solved questions for few-shot prompts; null for none.
    """

    @staticmethod
    def document(record: Record, where: str) -> dict[str, Any]:
        asked: Any = record.get("question")
        choices: Any = record.get("choices")
        if isinstance(asked, dict):
            asked, choices = asked.get("stem"), _columns(asked.get("choices"))
        _check_text(asked, "question", where)
        listed: dict[str, Any] = choices if isinstance(choices, dict) else {}
        texts, labels = listed.get("text"), listed.get("label")
        if not _all_texts(texts) or not _all_texts(labels) or len(texts) != len(labels):
            raise ValueError(
                f"{where}: expected choices with as many texts as labels, got {choices!r:.80}; {MEND}"
            )
        answer = record.get("answerKey")
        if answer not in labels:
            raise ValueError(f"{where}: expected an answerKey among {labels}, got {answer!r:.40}; {MEND}")
        return {"question": asked, "choices": {"text": texts, "label": labels}, "answerKey": answer}


class PiqaQuestions(QuestionFile):
    """PIQA: goal, sol1, sol2, label (0 or 1).

    Args:
        path: jsonl file of the questions.
        examples_path: jsonl file of solved questions for few-shot prompts; null for none.
    """

    @staticmethod
    def document(record: Record, where: str) -> dict[str, Any]:
        for name in ("goal", "sol1", "sol2"):
            _check_text(record.get(name), name, where)
        label = record.get("label")
        if label not in (0, 1) or isinstance(label, bool):
            raise ValueError(f"{where}: expected a label of 0 or 1, got {label!r:.40}; {MEND}")
        return {name: record[name] for name in ("goal", "sol1", "sol2", "label")}


@checked
class MmluQuestions:
    """MMLU: `test/SUBJECT_test.csv` and, for few-shot prompts, `dev/SUBJECT_dev.csv`, with the header
    question, choice0 to choice3, answer (0 to 3).

    Args:
        folder: holds `test` and `dev`.
        subjects: the subjects in force, e.g. anatomy; null for all that `test` holds.
    """

    def __init__(self, folder: str, subjects: list[str] | None = None) -> None:
        self.folder = folder
        self.subjects = subjects

    def questions(self) -> list[Question]:
        return [own for subject in self._chosen() for own in self._of(subject, "test")]

    def examples(self) -> list[Question]:
        if not (Path(self.folder) / "dev").is_dir():
            return []
        return [own for subject in self._chosen() for own in self._of(subject, "dev")]

    def _chosen(self) -> list[str]:
        ending = "_test.csv"
        present = sorted(p.name.removesuffix(ending) for p in Path(self.folder).glob(f"test/*{ending}"))
        if not present:
            raise ValueError(
                f"MmluQuestions.folder: expected files test/SUBJECT{ending}, got none in {self.folder!r}; "
                "set the folder, or THUNDERCAT_DATA to the folder of public data"
            )
        unknown = [subject for subject in self.subjects or () if subject not in present]
        if unknown or self.subjects == []:
            got = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"MmluQuestions.subjects: expected some of {present}, got {got}")
        return present if self.subjects is None else self.subjects

    def _of(self, subject: str, split: str) -> list[Question]:
        path = Path(self.folder) / split / f"{subject}_{split}.csv"
        return _read(str(path), lambda record, where: _mmlu(record, where, subject), subject)


def _read(path: str, parsed: Callable[[Record, str], dict[str, Any]], subject: str = "") -> list[Question]:
    """The questions of a file. Raises: ValueError where a line is none, where two have one id, or where the
    file holds none at all."""
    found: dict[str, Question] = {}
    for number, (line, record) in enumerate(read_records(path)):
        where = f"{path}:{line}"
        key = str(record.get("id") or number)
        if key in found:
            raise ValueError(f"{where}: the id {key!r} is that of {found[key].where} too; rename one")
        found[key] = Question(key, parsed(record, where), where, subject)
    if not found:
        raise ValueError(f"{path}: expected questions, got an empty file; fetch it again")
    return list(found.values())


def _columns(choices: Any) -> dict[str, list[Any]] | None:
    """The authors' list of {text, label} as the hub's two lists."""
    if not isinstance(choices, list) or not all(isinstance(own, dict) for own in choices):
        return None
    return {name: [own.get(name) for own in choices] for name in ("text", "label")}


def _mmlu(record: Record, where: str, subject: str) -> dict[str, Any]:
    names = [f"choice{i}" for i in range(4)]
    for name in ("question", *names):
        _check_text(record.get(name), name, where)
    answer = record.get("answer")
    if answer not in ("0", "1", "2", "3"):
        raise ValueError(f"{where}: expected an answer of 0 to 3, got {answer!r:.40}; {MEND}")
    choices = [record[name] for name in names]
    return {"question": record["question"], "subject": subject, "choices": choices, "answer": int(answer)}


def _check_text(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        got = "none" if value is None else f"{value!r:.40}"
        raise ValueError(f"{where}: expected a text as {name}, got {got}; {MEND}")


def _all_texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and len(values) > 1 and all(isinstance(v, str) and v for v in values)
