"""`thundercat chat RUN`: lines in, replies out."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.commands.chat import ChatSettings, converse
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.requests import Decoding, Request
from tests.conftest import chat_model
from tests.support.small_run import small_config

Run = Callable[..., tuple[int, str, str]]


def said(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Request, Decoding, int]]:
    """What the model is asked; it answers with the length of the history."""
    calls: list[tuple[Request, Decoding, int]] = []

    def reply(self: LanguageModel, prompts: list[Request], decoding: Decoding, seed: int) -> list[str]:
        calls.extend((request, decoding, seed) for request in prompts)
        return [f"reply {len(prompts[0].history)}\x1b"]

    monkeypatch.setattr(LanguageModel, "reply", reply)
    return calls


def test_a_conversation_goes_on_until_it_begins_anew(
    asked: list[tuple[Request, Decoding, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said(monkeypatch, "One", "Two", "/new", "Three", "", "Four")
    converse(chat_model(), ChatSettings("run", system="Be kind.", max_new_tokens=9, temperature=0.5, seed=3))
    first, second, third = asked
    assert [request.text for request, _, _ in asked] == ["One", "Two", "Three"]
    assert first[0].history == third[0].history == ()
    assert second[0].history == (("One", "reply 0\x1b"),)
    assert {request.system for request, _, _ in asked} == {"Be kind."}
    assert first[1] == Decoding(9, 0.5, 1.0)
    assert len({seed for _, _, seed in asked}) == 3
    assert capsys.readouterr().out.splitlines() == ["reply 0\\x1b", "reply 1\\x1b", "reply 0\\x1b"]


def test_what_the_template_cannot_take_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = chat_model()
    token = model.chat.tokenizer.all_special_tokens[0]
    said(monkeypatch, token, "Hello")
    converse(model, ChatSettings("run", max_new_tokens=2))
    captured = capsys.readouterr()
    assert "contains the template's special token" in captured.err and captured.err.count("\n") == 1
    assert captured.out.endswith("\n")


def test_a_run_s_model_talks(thundercat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert thundercat("fit", "--config", str(small_config(tmp_path)))[0] == 0
    for words, step in (((), 3), (("--ckpt_path=none",), 0)):
        said(monkeypatch, "Add 1 and 2.")
        status, out, err = thundercat("chat", str(tmp_path / "run"), "--max_new_tokens=12", *words)
        assert status == 0, err
        head, reply = out.strip().splitlines()
        assert f"step {step};" in head and reply


def test_the_run_s_own_system_message_holds_unless_another_is_given(
    thundercat: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[tuple[Request, Decoding, int]],
) -> None:
    own = "--data.encoding.system=Be brief."
    assert thundercat("fit", "--config", str(small_config(tmp_path)), own)[0] == 0
    for words in ((), ("--system=Be kind.",)):
        said(monkeypatch, "Add 1 and 2.")
        assert thundercat("chat", str(tmp_path / "run"), *words)[0] == 0
    assert [request.system for request, _, _ in asked] == ["Be brief.", "Be kind."]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "chat: no run in 'nowhere'"),
        (("nowhere", "--max_new_tokens=0"), "max_new_tokens: expected an integer >= 1, got 0"),
        (("nowhere", "--temperature=nan"), "temperature: expected a number >= 0, got nan"),
        ((), "the following arguments are required: RUN"),
    ],
)
def test_wrong_calls_are_one_line(thundercat: Run, words: tuple[str, ...], message: str) -> None:
    status, _, err = thundercat("chat", *words)
    assert status == 2
    assert message in err and err.count("\n") == 1
