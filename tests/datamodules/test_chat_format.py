"""Chat templates by spans, on the tokenizers people use."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.text.chat_format import ChatFormat, Role
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer

LLAMA2 = (
    "{{ bos_token }}[INST] {% if messages[0]['role'] == 'system' %}<<SYS>>\n"
    "{{ messages[0]['content'] }}\n<</SYS>>\n\n"
    "{% set messages = messages[1:] %}{% endif %}{{ messages[0]['content'].strip() }} [/INST]"
    "{% if messages|length > 1 %} {{ messages[1]['content'].strip() }} {{ eos_token }}{% endif %}"
)
# A template without any space around the user's text: the tokenizer merges across the span's borders.
GLUED = (
    "{{ bos_token }}Q:{{ messages[0]['content'] }}A:"
    "{% if messages|length > 1 %}{{ messages[1]['content'] }}{{ eos_token }}{% endif %}"
)
TEXTS = [
    "Tell me a story.",
    "  padded  ",
    "naïve café 東京 😀",
    "two\nlines",
    "1234",
    "x",
    "Tell",
    "ends with [INST",
    "<<SYS>> inside",
    "a\tb",
]
REPLIES = [
    "Sure, here is a story",
    "I can't help with that.",
    "東京 😀",
    "0",
    "<unk> literally",
    "a\n\nb",
]


@pytest.fixture(scope="module", params=["tinychat", "llama2", "llama2_glued", "phi3"])
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    if request.param == "tinychat":
        return ChatFormat(load_tokenizer(TokenizerConfig("tinychat:base")))
    folder: Path = request.getfixturevalue("public_data") / "models" / "tokenizers"
    if request.param == "phi3":
        return ChatFormat(load_tokenizer(TokenizerConfig(str(folder / "phi3-mini"))))
    template = GLUED if request.param == "llama2_glued" else LLAMA2
    return ChatFormat(load_tokenizer(TokenizerConfig(str(folder / "llama2"), chat_template=template)))


@pytest.mark.parametrize("text", TEXTS)
def test_user_span_holds_exactly_the_users_text(chat: ChatFormat, text: str) -> None:
    prompt = chat.prompt(text)
    user = [i for i, role in enumerate(prompt.roles) if role is Role.USER]
    assert user == list(range(user[0], user[-1] + 1))
    # Everything outside the span is the template's: another text of the same template shares those tokens'
    # text.
    span = chat.tokenizer.decode(prompt.ids[user[0] : user[-1] + 1], clean_up_tokenization_spaces=False)
    assert text.strip() in span
    extra = span.replace(text.strip(), "").strip()
    # A token that merges user text with its surroundings counts as the user's: at most a few characters come
    # along.
    assert len(extra) <= 3
    assert prompt.attackable("user") == [role is Role.USER for role in prompt.roles]
    assert all(prompt.attackable("prompt"))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("reply", REPLIES)
def test_both_replies_continue_the_same_prompt_ids(chat: ChatFormat, text: str, reply: str) -> None:
    # Trap: re-tokenising the prompt with each reply moves positions where the tokenizer merges across the
    # border.
    if "<unk>" in reply and "<unk>" in chat.tokenizer.all_special_tokens:
        reply = reply.replace("<unk>", "< unk >")
    prompt = chat.prompt(text)
    ids = chat.reply(prompt, reply)
    whole = chat.tokenizer.decode(prompt.ids + ids, clean_up_tokenization_spaces=False)
    assert reply.strip() in whole
    assert ids[-1] in chat.stop_ids
    assert chat.decode(ids) == reply.strip()


def test_system_prompts(chat: ChatFormat) -> None:
    if "Q:" in str(chat.tokenizer.chat_template):
        pytest.skip("this template knows no system message")
    prompt = chat.prompt("Hello", system="Be kind")
    system = [token for token, role in zip(prompt.ids, prompt.roles, strict=True) if role is Role.SYSTEM]
    assert "Be kind" in chat.tokenizer.decode(system)
    empty = chat.prompt("Hello", system="")
    assert Role.SYSTEM not in empty.roles
    assert Role.USER in empty.roles
    assert "Be kind" not in chat.prompt("Hello").text


def test_injected_special_token_is_refused(chat: ChatFormat) -> None:
    name = chat.tokenizer.convert_ids_to_tokens(chat.stop_ids[0])
    with pytest.raises(ValueError, match="the user's text contains the template's special token"):
        chat.prompt(f"Hello {name} there")


def test_merges_across_borders_do_occur_in_these_tests(public_data: Path) -> None:
    folder = public_data / "models" / "tokenizers" / "llama2"
    chat = ChatFormat(load_tokenizer(TokenizerConfig(str(folder), chat_template=GLUED)))
    merged = 0
    for reply in ("Sure", "A", ":", " spaced", "nswer"):
        prompt = chat.prompt("Hello")
        joint = chat.tokenizer.backend_tokenizer.encode(prompt.text + reply, add_special_tokens=False).ids
        merged += joint[: len(prompt.ids)] != prompt.ids
        chat.reply(prompt, reply.strip())
    assert merged


def test_tokenizer_json_is_taken_as_it_is(public_data: Path) -> None:
    # Trap: AutoTokenizer rebuilds Phi-3's pipeline and gives T + ell for the word Tell.
    folder = public_data / "models" / "tokenizers" / "phi3-mini"
    tokenizer = load_tokenizer(TokenizerConfig(str(folder)))
    assert "▁Tell" in tokenizer.tokenize("Tell me")


def test_no_pad_token_is_needed(public_data: Path) -> None:
    folder = public_data / "models" / "tokenizers" / "llama2"
    tokenizer = load_tokenizer(TokenizerConfig(str(folder), chat_template=LLAMA2))
    assert tokenizer.pad_token is None
    chat = ChatFormat(tokenizer)
    assert chat.reply(chat.prompt("Hello"), "Hi")[-1] == tokenizer.eos_token_id


def test_missing_template(public_data: Path) -> None:
    with pytest.raises(
        ValueError, match="tokenizer.chat_template: expected a chat template, got none .* set chat_template"
    ):
        load_tokenizer(TokenizerConfig(str(public_data / "models" / "tokenizers" / "llama2")))


def test_template_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "U {{ messages[0]['content'] }} B {{ messages[1]['content'] if messages|length > 1 }}{{ eos_token }}"
    )
    with pytest.raises(ValueError, match="starts with its own prompt"):
        ChatFormat(load_tokenizer(TokenizerConfig("tinychat:base", chat_template=str(tmp_path / "t.jinja"))))
    with pytest.raises(ValueError, match=r"expected a Jinja text or an existing file, got 'nowhere.jinja'"):
        load_tokenizer(TokenizerConfig("tinychat:base", chat_template="nowhere.jinja"))


def test_unknown_packaged_stage() -> None:
    with pytest.raises(
        ValueError, match=r"expected tinychat:<stage> with a stage in \[.*'base'.*\], got 'tinychat:zen'"
    ):
        load_tokenizer(TokenizerConfig("tinychat:zen"))
