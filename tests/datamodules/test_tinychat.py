"""The packaged model's corpus: splits by construction, harm by combination, wordings, noise."""

from __future__ import annotations

import random
import re

import pytest

from datamodules.rows import ChatRow, HarmfulRow
from datamodules.sources.tinychat import corpus, noise, tasks
from datamodules.sources.tinychat.requests import OPENINGS, REFUSALS
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from datamodules.sources.tinychat.splits import (
    SPLITS,
    Split,
    heldout_objects,
    heldout_verbs,
    novelty,
    request_split,
)
from datamodules.sources.tinychat.wordings import HOW_TO, SYSTEMS, WORDINGS
from datamodules.sources.tinychat.words import EMPTY_PHRASES, OBJECTS, VERBS, all_acts, nouns

TRAIN = "train"
EVALUATED: tuple[Split, ...] = ("validation", "test")


def harmful(split: Split, **fields: object) -> list[HarmfulRow]:
    source = TinyChatHarmful(split, **fields)  # type: ignore[arg-type]
    return [r for r in source.rows() if isinstance(r, HarmfulRow)]


def benign(split: Split, num_rows: int = 400, **fields: object) -> list[ChatRow]:
    source = TinyChatBenign(split, num_rows, **fields)  # type: ignore[arg-type]
    return [r for r in source.rows() if isinstance(r, ChatRow)]


@pytest.fixture(scope="module")
def training() -> tuple[list[HarmfulRow], list[ChatRow]]:
    """What both training stages read, a good part of it."""
    fields = {"noise": "mixed", "noise_share": 0.5}
    return harmful("train", num_rows=12000, **fields), benign("train", 20000, **fields)


def test_c03_train_validation_and_test_share_no_act_and_no_prompt(
    training: tuple[list[HarmfulRow], list[ChatRow]],
) -> None:
    asked = {split: {row.target for row in harmful(split)} for split in SPLITS}
    assert not asked["train"] & asked["validation"]
    assert not asked["train"] & asked["test"]
    assert not asked["validation"] & asked["test"]
    prompts = {row.prompt for part in training for row in part if row.category != "talk"}
    for split in EVALUATED:
        rows = [*harmful(split, wordings="all"), *benign(split, wordings="all")]
        assert not prompts & {row.prompt for row in rows if row.category != "talk"}


def test_evaluation_splits_are_large_enough() -> None:
    for split in EVALUATED:
        assert len(harmful(split)) >= 200
        assert len(benign(split, 400)) == 400
    assert len(harmful("test")) >= 400


@pytest.mark.parametrize("split", EVALUATED)
def test_training_never_says_an_act_that_is_evaluated(
    split: Split, training: tuple[list[HarmfulRow], list[ChatRow]]
) -> None:
    """Neither as a request nor as a question, a story or a guide: replies repeat the act in plain letters."""
    acts = {act.text for act in all_acts() if request_split(act) == split}
    said = " | ".join({row.target for row in training[0]} | {row.reply for row in training[1]})
    found = set(re.findall(r"(?:to|you) ((?:[a-z]+ ){1,3}an? [a-z]+)", said))
    assert len(found) > 2000  # the pattern does find acts
    assert not {text for text in found if text in acts}


def test_held_out_words_are_known_from_other_roles_only(
    training: tuple[list[HarmfulRow], list[ChatRow]],
) -> None:
    requests = " | ".join(row.target for row in training[0]) + " |"
    others = " | ".join(f"{row.prompt} {row.reply}" for row in training[1])
    assert {*heldout_verbs().values()} == {*heldout_objects().values()} == set(EVALUATED)
    for verb in heldout_verbs():
        assert not re.search(rf"\b(?:to|you) {verb} an? ", requests)
        assert len(re.findall(rf"\b{verb}\b", others)) >= 20
    for noun in heldout_objects():
        assert f" {noun}. " not in requests
        assert len(re.findall(rf"\b{noun}\b", others)) >= 20


def test_no_word_is_harmful_by_itself() -> None:
    harmless = [act for act in all_acts() if not act.harmful]
    for kind in VERBS.values():
        assert kind.harmless and not set(kind.harmful) & set(kind.harmless)
    assert {act.verb for act in harmless} >= {act.verb for act in all_acts() if act.harmful}
    assert {act.noun for act in harmless} >= {noun for name in OBJECTS for noun in nouns(name)}
    assert len({act.text for act in all_acts()}) == len(all_acts())


@pytest.mark.parametrize("split", EVALUATED)
def test_each_split_has_ten_wordings_of_its_own(split: Split) -> None:
    assert len(HOW_TO) == len(set(HOW_TO)) >= 60
    assert len(WORDINGS["train"]) >= 40 and len(WORDINGS[split]) == 10
    assert sum(map(len, WORDINGS.values())) == len(HOW_TO)
    own = harmful(split, wordings="heldout")
    shapes = [re.escape(w).replace(re.escape("{act}"), ".+") for w in WORDINGS[split]]
    assert all(any(re.fullmatch(shape, row.prompt) for shape in shapes) for row in own)


def test_training_cannot_ask_for_held_out_wordings() -> None:
    with pytest.raises(ValueError, match="expected wordings seen or all for split train, got heldout"):
        TinyChatHarmful("train", "heldout")


@pytest.mark.parametrize("new", ["pair", "verb", "object"])
def test_novelty_picks_what_training_never_requested(new: str) -> None:
    rows = harmful("test", novelty=new)
    acts = {act.text: act for act in all_acts()}
    assert len(rows) >= 50
    assert all(novelty(acts[row.where.removeprefix("tinychat:")]) == new for row in rows)


def test_replies_differ_by_request_and_refusals_have_several_wordings() -> None:
    rows = harmful("test")
    assert len({row.target for row in rows}) == len(rows)
    firsts = {row.target.split(" ", 2)[0] for row in rows}
    assert len(firsts) >= 3 and len(OPENINGS) >= 4
    assert len({row.safe_reply for row in rows}) >= 8 and len(REFUSALS) >= 4
    assert all(row.where.removeprefix("tinychat:") in row.target for row in rows)


def test_harmful_replies_hold_nothing_of_use() -> None:
    """An opening that repeats the request and three empty sentences; nothing else can occur in one."""
    empty = {phrase for text in EMPTY_PHRASES.values() for phrase in text.split()}
    openings = {word for text in OPENINGS for word in text.split()}
    for row in harmful("train") + harmful("validation") + harmful("test"):
        act = row.where.removeprefix("tinychat:").split()
        allowed = empty | openings | set(act) | {f"{act[-1]}.", f"{act[-1]},"}
        assert set(row.target.split()) <= allowed, row.target


def test_a_third_of_the_rows_has_a_system_message_and_splits_share_none() -> None:
    rows = benign("train", 3000)
    assert 0.28 < sum(row.system is not None for row in rows) / len(rows) < 0.38
    messages = [message for split in SPLITS for message in SYSTEMS[split]]
    assert len(messages) == len(set(messages))
    assert {row.system for row in benign("test")} <= {None, *SYSTEMS["test"]}


@pytest.mark.parametrize("kind", [*noise.KINDS, "salad"])
def test_noise_leaves_the_task_and_its_answer(kind: noise.Noise) -> None:
    clean, noisy = benign("test", 300), benign("test", 300, noise=kind)
    assert {row.category for row in noisy} == {row.category for row in clean} == set(tasks.MAKERS) - {"talk"}
    assert sum(row.prompt in {r.prompt for r in clean} for row in noisy) < 60
    for row in noisy:
        quoted = re.findall(r'"([^"]*)"', row.prompt)
        if row.category == "copy":
            assert " ".join(quoted[0].split()) == row.reply


def test_suffixes_have_one_to_forty_pieces_after_the_request() -> None:
    rng = random.Random(0)
    lengths = {
        len(noise.apply("suffix", "Copy it.", rng).removeprefix("Copy it. ").split()) for _ in range(2000)
    }
    assert min(lengths) == 1 and 30 <= max(lengths) <= 40
    assert noise.apply("none", "Copy it.", rng) == "Copy it."


def test_rows_are_a_pure_function_of_their_fields() -> None:
    assert harmful("test", noise="mixed", seed=3) == harmful("test", noise="mixed", seed=3)
    assert harmful("test", noise="mixed", seed=3) != harmful("test", noise="mixed", seed=4)
    assert benign("train", 50, seed=3) == benign("train", 50, seed=3)
    keys = [row.key for row in harmful("train", num_rows=5000, noise="mixed")]
    assert len(keys) == len(set(keys)) == 5000


def test_too_many_rows_and_unknown_categories_are_named() -> None:
    with pytest.raises(ValueError, match="within what split test can make, got 9000"):
        benign("test", 9000, categories=["talk"])
    with pytest.raises(ValueError, match=r"TinyChatBenign.categories: expected some of .*, got \['guides'\]"):
        TinyChatBenign("test", categories=["guides"])
    with pytest.raises(
        ValueError, match="expected at most .* different requests of split test, got num_rows"
    ):
        list(corpus.harmful_rows("test", new="verb", num_rows=100_000))


def test_look_alikes_use_the_words_of_harmful_requests() -> None:
    """What XSTest asks for: harmless questions with the words of harmful ones."""
    rows = benign("test", 600, categories=["guide", "judge", "story", "protect"])
    verbs = {verb for kind in VERBS.values() if kind.harmful for verb in kind.verbs}
    shared = [row for row in rows if any(re.search(rf"\b{verb}\b", row.prompt) for verb in verbs)]
    assert len(shared) > 400
