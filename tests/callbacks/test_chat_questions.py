"""Multiple-choice questions in a chat: prompts, and which letter a reply chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from callbacks.evaluations.blocks import BlockEvaluation
from callbacks.judges.base import label
from callbacks.judges.exact import ExactMatch
from callbacks.judges.letter import AnswerLetter, chosen
from datamodules.rows import ChatRow
from datamodules.sources.chat_questions import ChatQuestions, choices_of
from datamodules.sources.questions import MmluQuestions


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C) because it rusts", "C"),
        ("**D**", "D"),
        ("B. iron", "B"),
        ("The correct answer is B. Iron rusts.", "B"),
        ("The answer is (A).", "A"),
        ('Answer: "C"', "C"),
        ("The right option is D, since A. is wrong", "D"),
        ("Iron rusts, so B) is right.", "B"),
        ("A person who rusts is rare.", None),
        ("I think that iron rusts.", None),
        ("I cannot help with that.", None),
        ("", None),
    ],
)
def test_the_letter_that_is_chosen(reply: str, letter: str | None) -> None:
    assert chosen(reply) == letter
    assert AnswerLetter()("prompt", reply, "B") is (letter == "B")


def test_a_question_as_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    rows = "".join(f"Which metal {i}?,tin,iron,lead,zinc,{i % 4}\n" for i in range(6))
    (tmp_path / "test" / "metals_test.csv").write_text(
        f"question,choice0,choice1,choice2,choice3,answer\n{rows}"
    )
    found = list(ChatQuestions(MmluQuestions(str(tmp_path)), limit=3).rows())
    first, second, third = (row for row in found if isinstance(row, ChatRow))
    assert first.prompt.endswith("answer.\n\nWhich metal 0?\nA. tin\nB. iron\nC. lead\nD. zinc")
    assert (first.reply, second.reply, third.reply) == ("A", "C", "A")
    assert (first.key, third.key, first.category) == ("chat/metals/0", "chat/metals/4", "metals")
    assert first.where.endswith("metals_test.csv:2")
    assert len(list(ChatQuestions(MmluQuestions(str(tmp_path)), limit=99).rows())) == 6


def test_choices_of_every_benchmark() -> None:
    arc = {"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    assert choices_of(arc) == ("Q", ["x", "y"], 1)
    assert choices_of({"goal": "G", "sol1": "s", "sol2": "t", "label": 0}) == ("G", ["s", "t"], 0)


def test_who_says_what_is_served() -> None:
    (_, harmless) = BlockEvaluation(served=AnswerLetter()).probes()
    assert [label(judge) for judge in harmless.judges] == ["answer_letter@1"]
    (_, harmless) = BlockEvaluation().probes()
    assert isinstance(harmless.judges[0], ExactMatch)
