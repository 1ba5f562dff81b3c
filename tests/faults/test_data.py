"""Faults of the data that an audit found: each is refused, or named with file and line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer

from datamodules.adversarial import AdversarialData
from datamodules.evaluation import EvaluationData, EvaluationSets
from datamodules.rows import BadRowError, ChatRow, RowProblem
from datamodules.sources.combinators import Repeated
from datamodules.sources.harmbench import HarmBench
from datamodules.sources.tables import ChatTable, HarmfulTable
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from datamodules.text.chat_format import ChatFormat
from datamodules.text.encoding import EncodedChat, Encoder, EncodingConfig, utility_batch
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from tests.conftest import tinychat_format

TINYCHAT = TokenizerConfig("tinychat:base")


def write(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def evaluated(harmless: list[Any], **encoding: Any) -> EvaluationData:
    data = EvaluationData(TINYCHAT, EvaluationSets(harmless=harmless), EncodingConfig(160, **encoding))
    data.setup("test")
    return data


def problems(source: Any) -> list[str]:
    return [str(row) for row in source.rows() if isinstance(row, RowProblem)]


# --- A7: equal keys


def test_a07_files_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "prompts.csv", "prompt\none\ntwo\n")
    second = write(tmp_path / "b" / "prompts.csv", "prompt\nthree\nfour\nfive\n")
    columns = {"prompt": "prompt"}
    data = evaluated([ChatTable(first, columns=columns), ChatTable(second, columns=columns)])
    keys = [key for batch in data.loader("harmless") for key in batch.keys]
    assert keys == [*(f"a/prompts.csv:{i}" for i in (2, 3)), *(f"b/prompts.csv:{i}" for i in (2, 3, 4))]


def test_a07_equal_keys_are_an_error_that_names_both_places(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "prompt,id\none,x\ntwo,y\nthree,x\nfour,x\n")
    source = ChatTable(path, columns={"prompt": "prompt", "key": "id"})
    message = rf"data.evaluation.harmless: two rows have the key 'x': {path}:2 and {path}:4; give"
    with pytest.raises(ValueError, match=message):
        evaluated([source])
    same_name = [write(tmp_path / part / "set" / "p.txt", "hello\n") for part in "ab"]
    message = rf"two rows have the key 'set/p.txt:1': {same_name[0]}:1 and {same_name[1]}:1"
    with pytest.raises(ValueError, match=message):
        evaluated([ChatTable(p, "lines") for p in same_name])


def test_a07_training_rows_have_keys_of_their_own_too() -> None:
    def build(utility: list[Any]) -> None:
        AdversarialData(
            TINYCHAT,
            [TinyChatHarmful("train")],
            utility,
            encoding=EncodingConfig(160),
            harmful_per_step=1,
            utility_per_step=1,
        ).setup("fit")

    guides = TinyChatBenign("train", 100, categories=["guide"])
    with pytest.raises(ValueError, match=r"data.utility: two rows have the key 'tinychat/guide/"):
        build([guides, guides])
    build([Repeated(guides, 2)])


# --- A8: conversations


def messages(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CONVERSATION = messages(
    ("system", "You are helpful."),
    ("user", "What is 1 plus 1?"),
    ("assistant", "The sum is 2."),
    ("user", "And 2 plus 2?"),
    ("assistant", "The sum is 4."),
)


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


# --- A12: sources that yield nothing, nonsense in fields


def test_a12_unknown_names_and_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"TinyChatBenign.categories: .*'guide'.*got .*guides"):
        TinyChatBenign("validation", categories=["guides"])
    makers: list[Callable[[Any], object]] = [
        lambda n: ChatTable("x.csv", limit=n),
        lambda n: HarmfulTable("x.csv", limit=n),
        lambda n: HarmBench("x.csv", "x.json", limit=n),
        lambda n: TinyChatHarmful("train", limit=n),
        lambda n: TinyChatBenign("train", num_rows=n),
        lambda n: Repeated(TinyChatBenign("train"), times=n),
        lambda n: EvaluationSets(batch_size=n),
        lambda n: EncodingConfig(max_length=n),
        lambda n: AdversarialData(TINYCHAT, [TinyChatHarmful("train")], utility_per_step=0, micro_batches=n),
        lambda n: AdversarialData(TINYCHAT, [TinyChatHarmful("train")], utility_per_step=0, bucket_window=n),
    ]
    for make in makers:
        for nonsense in (-1, 0, float("nan"), True):
            with pytest.raises(ValueError, match=rf"expected an integer >= [12].*, got {nonsense}"):
                make(nonsense)


def test_a12_where_names_a_column_or_value_that_no_row_has(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "prompt,label\na,safe\nb,unsafe\n")
    columns = {"prompt": "prompt"}
    with pytest.raises(
        ValueError, match=r"where: no row of .*x.csv has a column 'lable'; it has \['label', 'pro"
    ):
        evaluated([ChatTable(path, columns=columns, where={"lable": "safe"})])
    with pytest.raises(
        ValueError, match=r"where: no row of .*x.csv has label = 'save'; there are \['safe', 'un"
    ):
        evaluated([ChatTable(path, columns=columns, where={"label": "save"})])
    data = evaluated([ChatTable(path, columns=columns, where={"label": "safe"})])
    assert len(data.examples["harmless"]) == 1


@pytest.mark.parametrize("content", ["", "prompt,reply\n", "\n\n"])
def test_a12_an_empty_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "empty.csv", content)
    good = ChatTable(write(tmp_path / "good.txt", "hello\n"), "lines")
    message = rf"data.evaluation.harmless.1: ChatTable of {path} yields no row; mend"
    with pytest.raises(ValueError, match=message):
        evaluated([good, ChatTable(path)])
    with pytest.raises(ValueError, match=rf"Repeated of ChatTable of {path} yields no row"):
        evaluated([good, Repeated(ChatTable(path), 2)])


def test_a12_a_source_of_bad_rows_alone_is_an_error_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.csv", "question\na\nb\n")
    good = ChatTable(write(tmp_path / "good.txt", "hello\n"), "lines")
    with pytest.raises(
        ValueError, match=r"harmless.1: .*bad.csv yields no usable row; 2 bad, the first: .*bad.csv:2"
    ):
        evaluated([good, ChatTable(path)], on_bad_row="skip")


# --- A15: control tokens


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


# --- B: files that are not what they claim

JSON_COLUMNS = {"prompt": "prompt"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            f'prompt\nok\n"{"x" * 140_000}"\n',
            r"a.csv:3: not valid CSV: field larger than field limit",
        ),
        (
            "a.csv",
            'prompt\nok\n"open\nand on\n',
            r"a.csv:3: not valid CSV: unexpected end of data; is a quote",
        ),
        ("a.csv", "prompt,reply\na\n", r"a.csv:2: expected 2 cells as in the header, got 1; quote cells"),
        ("a.csv", "prompt,reply\na,b,c\n", r"a.csv:2: expected 2 cells as in the header, got 3; quote cells"),
        ("a.csv", "prompt,prompt\na,b\n", r"a.csv:1: a column name occurs twice"),
        ("a.csv", b"prompt\nok\nna\xefve\n", r"a.csv:3: not UTF-8 \(invalid continuation byte\); save"),
        ("a.txt", b"ok\nna\x00ve\n", r"a.txt:2: a NUL character is no text; save"),
        ("a.txt", b"\xff\xfeh\x00i\x00", r"a.txt:1: not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, r"a.jsonl:2: not usable JSON: nested too deeply"),
        ("a.json", '[{"prompt":\n "a"},\n x]', r"a.json:3: not valid JSON"),
        ("a.json", "5", r"a.json: expected a JSON list, got int"),
        ("a.jsonl", "[1]", r"a.jsonl:1: expected a JSON dict, got list"),
        (
            "a.jsonl",
            '{"prompt": "a", "prompt": "b"}',
            r"a.jsonl:1: not usable JSON: the key 'prompt' occurs twice",
        ),
        ("a.jsonl", '{"prompt": ' + "9" * 5000 + "}", r"a.jsonl:1: not usable JSON: Exceeds the limit"),
        (
            "a.jsonl",
            r'{"prompt": "half \ud800 pair"}',
            r"a.jsonl:1: the prompt holds half a character \('\\ud800'\)",
        ),
        ("a.jsonl", r'{"prompt": "a \u0000 b"}', r"a.jsonl:1: the prompt holds a NUL character"),
        ("a.jsonl", '{"prompt": ["a"]}', r"a.jsonl:1: expected text in column 'prompt', got list"),
        ("a.jsonl", '{"prompt": null}', r"a.jsonl:1: expected text in column 'prompt', got NoneType"),
        (
            "a.parquet",
            b"PAR1 nonsense PAR1",
            r"a.parquet: (not a readable parquet file|reading parquet needs)",
        ),
    ],
)
def test_b_unreadable_files_are_one_line_with_place_and_remedy(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    format = "lines" if name.endswith("txt") else "columns"
    with pytest.raises(ValueError, match=message) as caught:
        evaluated([ChatTable(path, format, columns=JSON_COLUMNS)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ('["Sure"]', r"t.json: expected a JSON dict, got list"),
        ('{"one": 5}', r"t.json:1 one\[0\]: expected a non-empty target, got int"),
        ('{"one": []}', r"b.csv:2: no target for 'one' in .*t.json"),
        ('{"one": "Sure",\n "one": "Sure, b"}', r"t.json: not usable JSON: the key 'one' occurs twice"),
    ],
)
def test_b_harmbench_files_of_the_wrong_kind(tmp_path: Path, targets: str, message: str) -> None:
    behaviors = write(tmp_path / "b.csv", "Behavior,BehaviorID\ndo a,one\n")
    source = HarmBench(behaviors, write(tmp_path / "t.json", targets))
    with pytest.raises(ValueError, match=message):
        Encoder(tinychat_format(), EncodingConfig(160)).harmful(source.rows())
    replies = write(tmp_path / "s.csv", "Behavior,Reply\ndo a,No.\n")
    source = HarmBench(behaviors, write(tmp_path / "t.json", '{"one": "Sure"}'), replies)
    with pytest.raises(
        ValueError, match=r"s.csv:2: expected columns Behavior and Safe_Response, got \['Beha"
    ):
        list(source.rows())


def _mutated(content: bytes, rng: random.Random) -> bytes:
    """One to three bytes changed, removed or doubled."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place]
            case _:
                data[place:place] = data[place : place + rng.randint(1, 9)]
    return bytes(data)


SAMPLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "a.csv": ('prompt,reply\n"one, two",yes\nthree,"no\nway"\n', lambda path: ChatTable(path)),
    "a.jsonl": ('{"prompt": "one", "reply": "y\\u00e9s"}\n{"prompt": "two", "reply": "no"}\n', ChatTable),
    "a.txt": ("tell me\na naïve story\n", lambda path: ChatTable(path, "lines")),
    "m.json": (json.dumps([CONVERSATION] * 2), lambda path: ChatTable(path, "messages")),
    "h.csv": ("goal,target\nmake it,Sure\ndo it,Of course\n", HarmfulTable),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_b_byte_mutated_files_are_rows_or_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    content, source = SAMPLES[name]
    errors = []
    for seed in range(60):
        path = write(tmp_path / name, _mutated(content.encode(), random.Random(f"{name}/{seed}")))
        encoder = Encoder(tinychat_format(), EncodingConfig(160))
        try:
            rows = list(source(path).rows())
            encoder.harmful(rows) if name == "h.csv" else encoder.chats(rows, need_reply=name != "a.txt")
        except (ValueError, FileNotFoundError) as error:
            errors.append(str(error))
    assert 5 < len(errors) < 60
    assert all(name in error and "\n" not in error for error in errors), errors


# --- B: templates without end

FRAME = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("endless", "message"),
    [
        (LOOPS, "it does not end within 1000000 steps"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}xx{% endfor %}{% endfor %}",
            "it does not end",
        ),
        ("{% macro m() %}{{ caller() }}{% endmacro %}{{ 10 ** 10 ** 10 }}", r"it uses the operator \*\*"),
        ("{% if messages[0]['role'] == 'system' %}" + LOOPS + "{% endif %}", "it does not end"),
        ("{% if messages|length > 2 %}" + LOOPS + "{% endif %}", "it does not end"),
    ],
)
def test_b_a_template_without_end_is_refused(endless: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer.chat_template: {message}"):
        chat = ChatFormat(load_tokenizer(TokenizerConfig("tinychat:base", chat_template=endless + FRAME)))
        chat.prompt("Hello", system="Be kind", history=[("a", "b")])


def test_b_a_template_may_loop_as_chats_need_it() -> None:
    chat = ChatFormat(load_tokenizer(TokenizerConfig("tinychat:base", chat_template=FRAME)))
    turns = [("question", "answer")] * 100
    assert chat.prompt("Hello", history=turns).text.count("answer") == 100


# --- an evaluation alone


def test_an_evaluation_needs_no_training_source(tmp_path: Path) -> None:
    data = EvaluationData(
        TINYCHAT,
        EvaluationSets(
            [TinyChatHarmful("validation", limit=3)],
            [TinyChatBenign("validation", 4)],
            [TinyChatBenign("validation", 5)],
        ),
        EncodingConfig(160),
    )
    data.trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    data.setup("test")
    # Equal keys in two subjects are two examples: the subject is part of a result's identity.
    assert {subject: len(rows) for subject, rows in data.examples.items()} == {
        "harmful": 3,
        "harmless": 4,
        "utility": 5,
    }
    (batch,) = data.loader("harmful")
    assert batch.adversarial is not None
