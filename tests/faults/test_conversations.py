"""What the audit found about conversations and the texts in them: roles, turns, control tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.adversarial import AdversarialData
from datamodules.evaluation import EvaluationSets
from datamodules.rows import BadRowError, ChatRow, RowProblem
from datamodules.sources.tables import ChatTable, HarmfulTable
from datamodules.text.chat_format import ChatFormat
from datamodules.text.encoding import EncodedChat, Encoder, EncodingConfig, utility_batch
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from tests.conftest import tinychat_format
from tests.support.source_files import CONVERSATION, TINYCHAT, evaluated, messages, write


def conversation(tmp_path: Path, record: dict[str, Any], **fields: Any) -> ChatRow | RowProblem:
    (row,) = ChatTable(write(tmp_path / "m.jsonl", json.dumps(record)), "messages", **fields).rows()
    return row


def test_a08_roles_are_read_and_all_turns_kept(tmp_path: Path) -> None:
    row = conversation(tmp_path, CONVERSATION)
    assert isinstance(row, ChatRow)
    assert row.system == "You are helpful."
    assert row.history == (("What is 1 plus 1?", "The sum is 2."),)
    assert (row.prompt, row.reply) == ("And 2 plus 2?", "The sum is 4.")
    first = conversation(tmp_path, CONVERSATION, turns=1)
    assert isinstance(first, ChatRow)
    assert (first.history, first.prompt, first.reply) == ((), "What is 1 plus 1?", "The sum is 2.")
    open_ended = conversation(tmp_path, messages(("user", "Hi"), ("assistant", "Yo"), ("user", "Bye")))
    assert isinstance(open_ended, ChatRow)
    assert (open_ended.history, open_ended.prompt, open_ended.reply) == ((("Hi", "Yo"),), "Bye", "")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (messages(("assistant", "Hi")), "expected the roles .*, got assistant"),
        (messages(("user", "a"), ("user", "b")), "expected the roles .*, got user, user"),
        (messages(("user", "a"), ("tool", "b")), "expected the roles .*, got user, tool"),
        (messages(("user", "a"), ("system", "b")), "expected the roles .*, got user, system"),
        (messages(("system", "a")), "expected the roles .*, got system"),
        (messages(("user", " ")), "message 1: empty user turn"),
        ({"messages": ["hi"]}, "message 1: expected a role and a text"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            "message 1: expected a role and a text",
        ),
        ({"messages": {"role": "user"}}, "expected messages: a list of"),
        ({"text": "a"}, "expected messages: a list of"),
    ],
)
def test_a08_other_role_orders_are_bad_rows(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    row = conversation(tmp_path, record)
    assert isinstance(row, RowProblem)
    with pytest.raises(BadRowError, match=rf"m.jsonl:1: {reason}"):
        Encoder(tinychat_format(), EncodingConfig(160)).chats([row])


LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}<<SYS>>{{ m['content'] }}<</SYS>>"
    "{% elif m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module", params=["tinychat", "llama2", "phi3"])
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    if request.param == "tinychat":
        return tinychat_format()
    folder: Path = request.getfixturevalue("public_data") / "models" / "tokenizers"
    if request.param == "phi3":
        return ChatFormat(load_tokenizer(TokenizerConfig(str(folder / "phi3-mini"))))
    return ChatFormat(load_tokenizer(TokenizerConfig(str(folder / "llama2"), chat_template=LLAMA2)))


def learned(chat: ChatFormat, example: EncodedChat) -> str:
    ids = [label for label in example.labels if label != -100]
    return str(chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_a08_every_assistant_turn_is_learned_with_its_end(chat: ChatFormat) -> None:
    encoder = Encoder(chat, EncodingConfig(160))
    row = ChatRow("k", "And 2 plus 2?", "The sum is 4.", "f:1", history=(("What?", "The sum is 2."),))
    (example,) = encoder.chats([row])
    text = learned(chat, example)
    end = chat.tokenizer.decode(chat.end_of_turn).strip()
    assert text.replace(" ", "") == f"The sum is 2.{end}The sum is 4.{end}".replace(" ", "")
    assert len(example.labels) == example.length
    batch = utility_batch([example])
    assert (batch.labels[0] != -100).sum() == sum(label != -100 for label in example.labels)
    assert (batch.input_ids[0][batch.labels[0] != -100] == batch.labels[0][batch.labels[0] != -100]).all()


def test_a08_train_on_last_learns_the_last_reply_alone(chat: ChatFormat) -> None:
    row = ChatRow("k", "And?", "The sum is 4.", "f:1", history=(("What?", "It is 2."),), train_on="last")
    (example,) = Encoder(chat, EncodingConfig(160)).chats([row])
    assert "It is 2" not in learned(chat, example)
    assert "The sum is 4." in learned(chat, example)


def test_a08_a_conversation_is_evaluated_at_its_last_user_turn(tmp_path: Path) -> None:
    data = evaluated([ChatTable(write(tmp_path / "m.jsonl", json.dumps(CONVERSATION)), "messages")])
    (batch,) = data.loader("harmless")
    assert batch.prompts == ("And 2 plus 2?",)
    assert batch.systems == ("You are helpful.",)
    assert batch.histories == ((("What is 1 plus 1?", "The sum is 2."),),)
    assert batch.expected == ("The sum is 4.",)
    text = data.chat.tokenizer.decode(batch.prompt_ids[0])
    assert "The sum is 2." in text
    assert "The sum is 4." not in text


def test_a08_earlier_turns_that_are_evaluated_on_are_an_overlap(tmp_path: Path) -> None:
    data = AdversarialData(
        TINYCHAT,
        utility=[ChatTable(write(tmp_path / "m.jsonl", json.dumps(CONVERSATION)), "messages")],
        evaluation=EvaluationSets(
            harmless=[ChatTable(write(tmp_path / "e.txt", "what is 1 plus 1\n"), "lines")]
        ),
        encoding=EncodingConfig(160),
        harmful_per_step=0,
        utility_per_step=1,
    )
    with pytest.raises(
        ValueError, match=r"overlaps the training data in 1 rows, first .*e.txt:1 = .*m.jsonl:1"
    ):
        data.setup("fit")


def test_a15_control_tokens_are_refused_in_every_text(chat: ChatFormat) -> None:
    token = chat.tokenizer.convert_ids_to_tokens(chat.stop_ids[0])
    prompt = chat.prompt("Hello")
    for call, whose in (
        (lambda: chat.prompt(f"a {token} b"), "the user's text"),
        (lambda: chat.prompt("a", system=f"be {token} kind"), "the system message"),
        (lambda: chat.prompt("a", history=[(f"x {token}", "y")]), "an earlier turn"),
        (lambda: chat.prompt("a", history=[("x", f"y {token} z")]), "an earlier turn"),
        (lambda: chat.reply(prompt, f"Sure {token} then"), "the reply"),
    ):
        with pytest.raises(
            ValueError, match=f"{whose} contains the template's special token {token!r}".replace("|", r"\|")
        ):
            call()
    assert chat.prompt("a", history=[("x", "y")]).text.count(str(token)) >= 1


def test_a15_bad_replies_are_bad_rows(tmp_path: Path) -> None:
    token = tinychat_format().tokenizer.convert_ids_to_tokens(tinychat_format().stop_ids[0])
    row = {"goal": "a", "target": f"Sure{token}"}
    source = HarmfulTable(write(tmp_path / "h.jsonl", json.dumps(row)))
    with pytest.raises(BadRowError, match=r"h.jsonl:1: the reply contains the template's special token"):
        Encoder(tinychat_format(), EncodingConfig(160)).harmful(source.rows())
