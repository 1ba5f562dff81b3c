"""Questions of benchmarks out of local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.sources.questions import ArcQuestions, MmluQuestions, PiqaQuestions

HUB = {"question": "Warm?", "choices": {"text": ["sun", "ice"], "label": ["A", "B"]}, "answerKey": "A"}
AUTHORS = {
    "id": "q7",
    "question": {
        "stem": "Warm?",
        "choices": [{"text": "sun", "label": "A"}, {"text": "ice", "label": "B"}],
    },
    "answerKey": "A",
}
PIQA = {"goal": "Cool tea", "sol1": "wait", "sol2": "boil", "label": 0}
HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


def lines(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def subject(folder: Path, name: str, rows: str, split: str = "test") -> None:
    path = folder / split / f"{name}_{split}.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEADER + rows, encoding="utf-8")


def test_both_layouts_of_arc_give_the_hubs_documents(tmp_path: Path) -> None:
    path = lines(tmp_path / "arc.jsonl", HUB, AUTHORS)
    first, second = ArcQuestions(path, examples_path=path).questions()
    assert first.document == second.document == HUB
    assert (first.key, second.key) == ("0", "q7")
    assert second.where == f"{path}:2"
    assert len(ArcQuestions(path, examples_path=path).examples()) == 2
    assert ArcQuestions(path).examples() == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**HUB, "answerKey": "C"}, r"arc.jsonl:2: expected an answerKey among \['A', 'B'\], got 'C'; mend"),
        ({**HUB, "question": " "}, r"arc.jsonl:2: expected a text as question, got ' '"),
        ({**HUB, "choices": ["sun"]}, r"arc.jsonl:2: expected choices with as many texts as labels, got"),
        ({**HUB, "choices": {"text": ["sun", "ice"], "label": ["A"]}}, r"arc.jsonl:2: expected choices"),
        ({**HUB, "id": "0"}, r"arc.jsonl:2: the id '0' is that of .*arc.jsonl:1 too; rename one"),
    ],
)
def test_a_line_that_is_no_question_of_arc_is_named(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ArcQuestions(lines(tmp_path / "arc.jsonl", HUB, record)).questions()


@pytest.mark.parametrize(("field", "value"), [("label", 2), ("label", True), ("sol2", ""), ("goal", None)])
def test_a_line_that_is_no_question_of_piqa_is_named(tmp_path: Path, field: str, value: Any) -> None:
    path = lines(tmp_path / "piqa.jsonl", PIQA, {**PIQA, field: value})
    with pytest.raises(ValueError, match=rf"piqa.jsonl:2: expected .*{field}"):
        PiqaQuestions(path).questions()
    assert PiqaQuestions(lines(tmp_path / "good.jsonl", PIQA)).questions()[0].document == PIQA


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"piqa.jsonl: expected questions, got an empty file"):
        PiqaQuestions(lines(tmp_path / "piqa.jsonl")).questions()


def test_mmlu_is_read_by_subject(tmp_path: Path) -> None:
    subject(tmp_path, "law", "Who?,a,b,c,d,2\nWhat?,a,b,c,d,0\n")
    subject(tmp_path, "anatomy", '"Where, then?",a,b,c,d,3\n')
    subject(tmp_path, "law", "Example?,a,b,c,d,1\n", "dev")
    subject(tmp_path, "anatomy", "Example?,a,b,c,d,1\n", "dev")
    found = MmluQuestions(str(tmp_path)).questions()
    assert [(own.subject, own.key) for own in found] == [("anatomy", "0"), ("law", "0"), ("law", "1")]
    assert found[1].document == {
        "question": "Who?",
        "subject": "law",
        "choices": ["a", "b", "c", "d"],
        "answer": 2,
    }
    chosen = MmluQuestions(str(tmp_path), ["law"])
    assert len(chosen.questions()) == 2
    assert [own.subject for own in chosen.examples()] == ["law"]


def test_bad_files_and_subjects_of_mmlu_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"MmluQuestions.folder: expected files test/SUBJECT_test.csv"):
        MmluQuestions(str(tmp_path)).questions()
    subject(tmp_path, "law", "Who?,a,b,c,d,4\n")
    with pytest.raises(ValueError, match=r"law_test.csv:2: expected an answer of 0 to 3, got '4'"):
        MmluQuestions(str(tmp_path)).questions()
    with pytest.raises(ValueError, match=r"MmluQuestions.subjects: expected some of \['law'\], got 'lore'"):
        MmluQuestions(str(tmp_path), ["lore"]).questions()


def test_the_public_files_are_read(public_data: Path) -> None:
    data = public_data / "data"
    easy, hard = data / "arc_easy/test.jsonl", data / "arc/ARC-Challenge-Test.jsonl"
    counts = [len(ArcQuestions(str(path)).questions()) for path in (easy, hard)]
    counts.append(len(PiqaQuestions(str(data / "piqa/validation.jsonl")).questions()))
    mmlu = MmluQuestions(str(data / "mmlu")).questions()
    assert [*counts, len(mmlu)] == [2376, 1150, 1838, 14042]
    assert len({question.subject for question in mmlu}) == 57
