"""Files that are not what they claim, and templates without end: one line that names the file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.sources.harmbench import HarmBench
from datamodules.sources.tables import ChatTable, HarmfulTable
from datamodules.text.chat_format import ChatFormat
from datamodules.text.encoding import Encoder, EncodingConfig
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from tests.conftest import tinychat_format
from tests.support.source_files import CONVERSATION, evaluated, write

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
