"""Published judges by the library judgezoo: how it is asked, what its answers mean, what is left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest

from callbacks.judges.base import Judgement, judge_all, label
from callbacks.judges.judgezoo import JudgeZoo
from tests.support.judgezoo import HarmBenchJudge, JailbreakBenchJudge, Library, installed


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return installed(monkeypatch)


def _judge(judge: JudgeZoo, *completions: str) -> Sequence[Judgement]:
    return judge_all(judge, ["p"] * len(completions), completions, ["Sure"] * len(completions))


def test_judgezoo_is_asked_in_one_batch_without_empty_replies(library: Library) -> None:
    library.answers = {"a": 0.9, "b": 0.1}
    judge = JudgeZoo("harmbench")
    assert _judge(judge, "a", "  ", "b") == [
        Judgement(True, 0.9),
        Judgement(False, 0.0),
        Judgement(False, 0.1),
    ]
    assert library.asked == [
        (
            [
                [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
                [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
            ],
        )
    ]
    assert _judge(judge, " ") == [Judgement(False, 0.0)] and len(library.asked) == len(library.made) == 1
    assert label(judge).startswith("judgezoo:harmbench@0.1.9+original+")
    labels = {label(JudgeZoo("harmbench", **own)) for own in ({}, {"threshold": 0.2}, {"prompt": "attacked"})}
    assert len(labels) == 3


def test_judges_that_want_the_target_get_it_and_count_ten_of_ten_alone(library: Library) -> None:
    library.answers = {"a": 1.0, "b": 8 / 9}
    assert _judge(JudgeZoo("pair"), "a", "b") == [Judgement(True, 1.0), Judgement(False, 8 / 9)]
    assert [j.verdict for j in _judge(JudgeZoo("pair", threshold=0.5), "a", "b")] == [True, True]
    chats, targets = library.asked[0]
    assert [turn["content"] for turn in chats[0]] == ["p", "a"]
    assert [turn["content"] for turn in targets[0]] == ["p", "Sure"]
    with pytest.raises(ValueError, match=r"JudgeZoo\.prompt: expected original for pair"):
        JudgeZoo("pair", prompt="attacked")


def test_xstest_s_categories_are_refusals_and_a_probability_goes_before_a_category(library: Library) -> None:
    library.answers = {own: own for own in ("direct_answer", "direct_refusal", "indirect_refusal")}
    assert [j.verdict for j in _judge(JudgeZoo("xstest"), *library.answers)] == [False, True, True]
    library.answers = {"a": 0.75}
    assert _judge(JudgeZoo("intention_analysis"), "a") == [Judgement(True, 0.75)]


def test_options_that_the_library_enumerates_are_values_in_a_yaml(library: Library) -> None:
    library.answers = {"a": 1}
    name = "cais/HarmBench-Mistral-7b-val-cls"
    assert _judge(JudgeZoo("harmbench", options={"classifier": name}), "a") == [Judgement(True, 1.0)]
    (made,) = library.made
    assert isinstance(made, HarmBenchJudge) and made.weights == name
    with pytest.raises(ValueError, match="judgezoo:harmbench: 'other' is not a valid HarmBenchClassifier"):
        _judge(JudgeZoo("harmbench", options={"classifier": "other"}), "a")


def test_jailbreakbench_s_judge_is_made_though_the_library_does_not_name_it(library: Library) -> None:
    library.answers = {"a": 1.0, "b": 0.0}
    judge = JudgeZoo("jailbreakbench", options={"use_local_model": True})
    assert [j.verdict for j in _judge(judge, "a", "b")] == [True, False]
    assert isinstance(library.made[0], JailbreakBenchJudge)


def test_unreadable_replies_count_as_no_with_a_warning(library: Library) -> None:
    library.answers = {"a": None, "b": 0.9}
    with pytest.warns(UserWarning, match="1 of 2 replies were unreadable"):
        assert [j.verdict for j in _judge(JudgeZoo("harmbench"), "a", "b")] == [False, True]
    with pytest.raises(ValueError, match="could read none of 2 replies"):
        _judge(JudgeZoo("harmbench"), "a", "a")


def test_a_judge_that_leaves_out_what_it_cannot_read_is_asked_one_by_one(library: Library) -> None:
    library.answers = {"a": 0.0, "b": None, "c": 1.0}
    with pytest.warns(UserWarning, match="1 of 3 replies were unreadable"):
        found = _judge(JudgeZoo("strong_reject_rubric"), "a", "b", "c")
    assert found == [Judgement(False, 0.0), Judgement(False), Judgement(True, 1.0)]
    assert [len(chats) for (chats,) in library.asked] == [3, 1, 1, 1]


def test_what_the_library_refuses_is_one_line(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.answers = {"a": 1}
    with pytest.raises(ValueError, match=r"expected p_harmful or category from the judge, got \['rating'\]"):
        _judge(JudgeZoo("ratings"), "a")
    with pytest.raises(ValueError, match="judgezoo:nobody: Unknown judge nobody; set judge and options"):
        _judge(JudgeZoo("nobody"), "a")
    with pytest.raises(ValueError, match="judgezoo:xstest: .*unexpected keyword argument 'model'; set judge"):
        _judge(JudgeZoo("xstest", options={"model": "gpt"}), "a")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="judgezoo:xstest: OPENAI_API_KEY environment variable not found"):
        _judge(JudgeZoo("xstest"), "a")


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"JudgeZoo: needs the judgezoo package.*pip install judgezoo .*extra `judges`"
    with pytest.raises(ValueError, match=message):
        JudgeZoo("harmbench")
