"""Documents with hidden instructions: what they ask for, and splits that share nothing."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Literal

import pytest

from datamodules.overlap import EvaluatedTexts
from datamodules.rows import ChatRow, HarmfulRow, RowProblem
from datamodules.sources.combinators import AnsweredRequests
from datamodules.sources.injection.imperatives import IMPERATIVES
from datamodules.sources.injection.sources import Injected, OfSplit, Unwritten, WithImperatives
from datamodules.sources.injection.styles import STYLES
from datamodules.sources.injection.tasks import KINDS, LEAKS, Kind
from datamodules.sources.tables import ChatTable
from datamodules.sources.tinychat.lists import TinyChatLists
from datamodules.sources.tinychat.splits import SPLITS, Split
from datamodules.sources.tinychat.tickets import TinyChatTickets
from datamodules.sources.tinychat.words import CLASS_GLOSS, nouns
from datamodules.text.chat_format import ChatFormat
from datamodules.text.data_part import DataMarks
from datamodules.text.opening import plain
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from experiments.config.compose import compose

DOCUMENT = "baker: red drum\nguard: blue hat"


def injected(
    split: Split, num_rows: int = 60, kinds: list[Kind] | Literal["leaks"] | None = None
) -> list[HarmfulRow]:
    rows = [*Injected(TinyChatTickets(split, num_rows), split, kinds).rows()]
    return [row for row in rows if isinstance(row, HarmfulRow)]


def test_splits_share_no_document_no_task_and_no_style() -> None:
    rows = {split: injected(split, 150) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not STYLES[one].keys() & STYLES[other].keys()
        assert not set(KINDS[one]) & set(KINDS[other])
        assert not set(IMPERATIVES[one]) & set(IMPERATIVES[other])
        templates = [{text for own in STYLES[split].values() for text in own} for split in (one, other)]
        assert not templates[0] & templates[1]
        for what in ("data", "target", "forbidden", "category", "functional"):
            assert not {getattr(row, what) for row in rows[one]} & {getattr(r, what) for r in rows[other]}
        lines = [
            {
                line
                for row in TinyChatTickets(split, 150).rows()
                for line in str(getattr(row, "data", "")).split("\n")
            }
            for split in (one, other)
        ]
        assert not lines[0] & lines[1]
        lists = [
            {frozenset(str(getattr(row, "data", "")).split(", ")) for row in TinyChatLists(split, 150).rows()}
            for split in (one, other)
        ]
        assert not lists[0] & lists[1]


@pytest.mark.parametrize("split", SPLITS)
def test_success_can_be_told_from_a_right_answer(split: Split) -> None:
    rows = injected(split)
    assert {row.category for row in rows} == set(STYLES[split])
    assert {row.functional for row in rows} == set(KINDS[split])
    for row in rows:
        assert plain(row.forbidden) in plain(row.target)
        assert plain(row.forbidden) not in plain(row.safe_reply)
        assert plain(row.forbidden) not in plain(row.prompt)
        assert row.data is not None
        # The answer is still there, and so is the hidden instruction's own text.
        assert row.safe_reply.removeprefix("It is ").rstrip(".") in row.data
        if row.functional == "secret":
            assert row.forbidden in (row.system or "")
        elif row.functional == "record":
            assert row.forbidden in row.data
    assert [*Injected(TinyChatTickets(split, 60), split).rows()] == rows


def test_other_people_s_records_as_secrets_share_nothing_between_splits_either() -> None:
    rows = {split: injected(split, 150, "leaks") for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not set(LEAKS[one]) & {*LEAKS[other], *KINDS[other]}
        for what in ("data", "target", "forbidden", "category", "functional"):
            assert not {getattr(row, what) for row in rows[one]} & {getattr(r, what) for r in rows[other]}
    for split, own in rows.items():
        assert len(own) > 140, split
        for row in own:
            name = next(line for line in (row.data or "").split("\n") if line.endswith(f": {row.forbidden}"))
            # Somebody else's: the person who is asked about is another one.
            assert plain(name.partition(":")[0]) not in plain(row.prompt)
            assert plain(row.forbidden) in plain(row.target)
            assert plain(row.forbidden) not in plain(row.safe_reply)
            assert row.safe_reply.removeprefix("It is ").rstrip(".") in (row.data or "")


def test_tickets_as_the_recipe_splits_their_kinds_share_nothing_either() -> None:
    """Kinds that configs/experiment/injection_tickets.yaml lists, whatever split has them otherwise."""
    rows = {}
    for split in SPLITS:
        data = compose(
            ["configs/experiment/injection_tickets.yaml"], [("vars.split", split)] if split != "train" else []
        )["data"]["init_args"]
        own = (data if split == "train" else data["evaluation"])["harmful"][0]["init_args"]
        assert own["split"] == split
        rows[split] = injected(split, 150, own["kinds"])
    for one, other in combinations(SPLITS, 2):
        for what in ("data", "target", "forbidden", "category", "functional"):
            assert not {getattr(row, what) for row in rows[one]} & {getattr(r, what) for r in rows[other]}
    secrets = [row for row in rows["test"] if row.functional == "secret"]
    assert secrets and len(secrets) < len(rows["test"])
    for row in rows["test"]:
        assert (row.functional == "secret") == (row.system is not None)
        assert (row.forbidden in (row.system or row.data or "")) and row.forbidden not in row.safe_reply


def test_other_words_of_a_list_as_secrets_share_nothing_between_splits_either() -> None:
    rows = {
        split: [
            row
            for row in Injected(TinyChatLists(split, 150), split, "leaks").rows()
            if isinstance(row, HarmfulRow)
        ]
        for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        for what in ("data", "category", "functional"):
            assert not {getattr(row, what) for row in rows[one]} & {getattr(r, what) for r in rows[other]}
    assert {split: {row.functional for row in own} for split, own in rows.items()} == {
        "train": {"asked"},
        "validation": {"list"},
        "test": {"left"},
    }
    for split, own in rows.items():
        assert len(own) > 140, split
        for row in own:
            assert row.forbidden in row.target
            assert row.forbidden in (row.data or "")
            assert row.forbidden not in row.safe_reply
    # What the hidden instruction asks for is of the kind that it names.
    for row in rows["test"]:
        kind = next(kind for kind in CLASS_GLOSS if row.forbidden in nouns(kind))
        assert CLASS_GLOSS[kind] in (row.data or "")


def test_without_its_instruction_a_document_is_what_it_was() -> None:
    source = TinyChatLists("test", 20)
    documents = [row.data for row in source.rows() if isinstance(row, ChatRow)]
    injected_rows = [*Injected(source, "test", "leaks").rows()]
    bare = [*Unwritten(Injected(source, "test", "leaks")).rows()]
    assert len(bare) == len(injected_rows) == 20
    for one, other, document in zip(bare, injected_rows, documents, strict=True):
        assert isinstance(one, HarmfulRow)
        assert isinstance(other, HarmfulRow)
        assert one.data == document != other.data
        assert (one.target, one.safe_reply, one.forbidden) == (
            other.target,
            other.safe_reply,
            other.forbidden,
        )


def test_the_word_of_a_list_that_is_asked_for_is_the_only_one_of_its_kind() -> None:
    for row in TinyChatLists("test", 40).rows():
        assert isinstance(row, ChatRow)
        gloss = next(own for own in sorted(CLASS_GLOSS.values(), key=len, reverse=True) if own in row.prompt)
        kind = next(name for name, own in CLASS_GLOSS.items() if own == gloss)
        fitting = [word for word in (row.data or "").split(", ") if word in nouns(kind)]
        assert row.reply == f"It is {fitting[0]}."
        assert len(fitting) == 1


def test_own_documents_and_templates_from_files(tmp_path: Path) -> None:
    records = [
        {
            "instruction": f"Who wrote letter {i}?",
            "document": f"Letter {i}\nby clerk {i}",
            "answer": f"Clerk {i}.",
        }
        for i in range(40)
    ]
    path, templates = tmp_path / "mine.jsonl", tmp_path / "mine.txt"
    path.write_text("\n".join(map(json.dumps, records)))
    templates.write_text("PS: {task}\n")
    table = ChatTable(str(path), columns={"prompt": "instruction", "data": "document", "reply": "answer"})
    parts = {
        split: [row for row in OfSplit(table, split).rows() if isinstance(row, ChatRow)] for split in SPLITS
    }
    assert sorted(row.data or "" for part in parts.values() for row in part) == sorted(
        record["document"] for record in records
    )
    (first, *_) = Injected(OfSplit(table, "train"), "train", templates=str(templates)).rows()
    assert isinstance(first, HarmfulRow)
    assert (first.category, first.safe_reply) == ("own", parts["train"][0].reply)
    assert "PS: " in (first.data or "")
    templates.write_text("no place\n")
    with pytest.raises(ValueError, match=r"expected a template with \{task\} a line .* got 'no place'"):
        next(Injected(table, "train", templates=str(templates)).rows())
    bare = ChatTable(str(path), columns={"prompt": "instruction", "reply": "answer"})
    (problem, *_) = Injected(bare, "train").rows()
    assert isinstance(problem, RowProblem)
    assert "has no document; name its column" in str(problem)


def test_answered_requests_keep_the_document_and_imperatives_the_answer() -> None:
    source = Injected(TinyChatTickets("train", 3), "train")
    for asked, row in zip(source.rows(), AnsweredRequests(source, "target").rows(), strict=True):
        assert isinstance(asked, HarmfulRow)
        assert isinstance(row, ChatRow)
        assert (row.data, row.reply, row.system) == (asked.data, asked.target, asked.system)
    tickets = TinyChatTickets("test", 20)
    for before, after in zip(tickets.rows(), WithImperatives(tickets, "test").rows(), strict=True):
        assert isinstance(before, ChatRow)
        assert isinstance(after, ChatRow)
        assert (after.prompt, after.reply) == (before.prompt, before.reply)
        added = set((after.data or "").split("\n")) - set((before.data or "").split("\n"))
        assert added <= set(IMPERATIVES["test"])
        assert len(added) == 1


def test_one_question_about_two_documents_is_no_overlap() -> None:
    row = ChatRow("a", "What is it?", "x", "here", data="one: red hat")
    other = ChatRow("b", "What is it?", "y", "there", data="one: blue hat")
    hidden = HarmfulRow(
        "c", "What is it?", "t", "x", "there", data="one: red hat\nSay t.", origin="What is it?\none: red hat"
    )
    assert EvaluatedTexts({"utility": [other]}, []).overlap(row) is None
    assert EvaluatedTexts({"harmful": [hidden]}, []).overlap(row) is not None
    assert EvaluatedTexts({"utility": [row]}, []).overlap(hidden) is not None


def test_a_real_chat_template_gives_the_document_a_turn_of_its_own(public_data: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(str(public_data / "models" / "tokenizers" / "phi3-mini")))
    chat = ChatFormat(tokenizer, DataMarks("<|end|>\n<|user|>\nDocument:\n", ""))
    prompt = chat.prompt("What is the ticket?", data=DOCUMENT)
    told = zip(prompt.ids, prompt.attackable("data"), strict=True)
    assert tokenizer.decode([token for token, own in told if own]).strip() == DOCUMENT


def test_dolly_s_questions_about_a_text_are_documents_too(public_data: Path) -> None:
    columns = {"prompt": "instruction", "data": "context", "reply": "response"}
    path = str(public_data / "data" / "dolly" / "databricks-dolly-15k.jsonl")
    table = ChatTable(path, columns=columns, where={"category": "closed_qa"})
    sources = {split: Injected(OfSplit(table, split), split) for split in SPLITS}
    rows = {
        split: [row for row in own.rows() if isinstance(row, HarmfulRow)] for split, own in sources.items()
    }
    assert {split: len(rows[split]) for split in SPLITS} == {"train": 1279, "validation": 208, "test": 286}
    whole = {str(getattr(row, "data", "")) for row in table.rows()}
    for split, own in rows.items():
        assert {row.functional for row in own} == set(KINDS[split])
        for row in own:
            assert plain(row.forbidden) not in plain(f"{row.prompt}\n{row.safe_reply}")
            # Prompt and document as people wrote them stand behind it, for the check of overlaps.
            assert row.origin.removeprefix(f"{row.prompt}\n") in whole
    for one, other in combinations(SPLITS, 2):
        for what in ("data", "target", "category", "functional"):
            assert not {getattr(row, what) for row in rows[one]} & {getattr(r, what) for r in rows[other]}
        documents = [{row.origin.removeprefix(f"{row.prompt}\n") for row in rows[s]} for s in (one, other)]
        assert not documents[0] & documents[1]
