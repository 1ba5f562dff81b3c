"""Searches that are made of others: placements, stages, suffixes for many requests and from other runs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from callbacks.judges.exact import TargetPrefix
from datamodules.text.envelope import Envelope
from lightning_modules.attacks.suffix.adaptive import AdaptiveGCG, Stage
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.search import SuffixSearch
from lightning_modules.attacks.suffix.slots import Placement, make_slot, replayable
from lightning_modules.attacks.suffix.stored import StoredSuffixes
from lightning_modules.attacks.suffix.targets import OtherTargets, says_target
from lightning_modules.attacks.suffix.universal import UniversalSuffix
from lightning_modules.attacks.text.transfer import Stored, TransferSuffixes
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig, load_model
from lightning_modules.models.reply import Reply
from tests.conftest import FAMILIES, chat_model, text_batch, tinychat_format
from tests.support.rows import row, stored


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packaged(stage: str) -> LanguageModel:
    return LanguageModel(load_model(ModelConfig(f"tinychat:{stage}")).eval(), chat=tinychat_format())


# --- placement


@pytest.mark.parametrize("place", ["before", "around"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_tokens_before_and_around_the_request_are_the_whole_prompt_s(
    family: str, place: Placement
) -> None:
    model = chat_model(family, torch.float64)
    search = SuffixSearch(model, text_batch(3), 5, " x", 3, place=place)
    rows, drawn = torch.tensor([0, 2, 1, 2]), torch.randint(10, 1000, (4, 5), generator=rng())
    base = drawn.clone()
    base[:, 3] += 1  # the first change stands behind the request where there are tokens around it
    found = search.losses(rows, drawn)
    changed, could = search.scores_of_changes(rows[:3], drawn[:3], [0, 2, 1], base[:3])
    for i, owner in enumerate(rows.tolist()):
        ids = torch.tensor([search.slots[owner].ids(drawn[i].tolist())])
        reply = Reply(search.target.ids[owner : owner + 1], search.target.mask[owner : owner + 1])
        (plain,) = model.reply_log_probs(model.embed(ids), torch.ones_like(ids, dtype=torch.bool), reply)
        torch.testing.assert_close(found[i], -plain[0].detach(), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(changed, found[:3], atol=1e-7, rtol=1e-7)
    assert not could.any()


def test_the_request_stays_whole_wherever_the_free_tokens_stand() -> None:
    chat, prompt = tinychat_format(), "How do I bake bread?"
    before = make_slot(chat, prompt, Envelope("Be brief."), " x", 4, "before")
    assert (before.user, before.rest, before.head) == ("", f" {prompt}", 0)
    around = make_slot(chat, prompt, Envelope(), " x", 5, "around")
    assert (around.head, len(around.suffix)) == (3, 5)
    (text,) = replayable(chat, [around], [around.suffix])
    assert text is not None
    assert f" {prompt} " in text
    space = chat.tokenizer.convert_tokens_to_ids("Ġ")
    # Templates strip the user's text: white space at its beginning cannot be typed.
    assert replayable(chat, [before], [[space, *before.suffix[1:]]]) == [None]


# --- what counts as success


def test_which_candidates_could_say_the_target_is_exact() -> None:
    model, batch = packaged("helpful"), text_batch(2)
    search = SuffixSearch(model, batch, 5, " x", None)
    # Around suffixes that say it, one swap decides.
    _, found = GCG(5, num_steps=30, width=32, topk=64).go_on(model, batch, [None, None], rng())
    rows = torch.arange(2).repeat_interleave(20)
    drawn = torch.tensor(found).repeat_interleave(20, 0)
    drawn[torch.arange(40), torch.arange(40) % 5] = torch.randint(10, 1000, (40,), generator=rng())
    _, could = search.scores(rows, drawn)
    said = search.saying(rows.tolist(), drawn.tolist())
    assert could.tolist() == said
    assert 0 < sum(said) < 40


def test_the_likeliest_candidate_that_says_the_target_wins_over_lower_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = SuffixSearch(chat_model(), text_batch(2), 3, " x", None)
    candidates = torch.randint(10, 1000, (5, 3), generator=rng())
    asked: list[list[int]] = []

    def saying(rows: Sequence[int], suffixes: Sequence[list[int]]) -> list[bool]:
        asked.extend(suffixes)
        return [suffix != candidates[1].tolist() for suffix in suffixes]

    monkeypatch.setattr(search, "saying", saying)
    search.ledger.record([0, 1], candidates[[0, 4]].tolist(), torch.tensor([0.1, 0.5]))
    could = torch.tensor([False, True, True, True, False])
    means = torch.tensor([0.1, 0.2, 0.4, 0.3, 0.5])
    assert search.finish([0, 0, 0, 0, 1], candidates, could, means) == {0}
    assert asked == candidates[[1, 3, 2]].tolist()  # by loss; neither the impossible nor the other row's
    assert search.ledger.best == [candidates[3].tolist(), candidates[4].tolist()]


def test_every_candidate_that_could_say_the_target_is_looked_at_until_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = SuffixSearch(chat_model(), text_batch(2), 3, " x", None)
    candidates = torch.arange(10, 70).reshape(20, 3)
    asked: list[tuple[int, int]] = []

    def saying(rows: Sequence[int], suffixes: Sequence[list[int]]) -> list[bool]:
        asked.extend((row, (suffix[0] - 10) // 3) for row, suffix in zip(rows, suffixes, strict=True))
        return [suffix == candidates[5].tolist() for suffix in suffixes]

    monkeypatch.setattr(search, "saying", saying)
    search.ledger.record([0, 1], candidates[[9, 19]].tolist(), torch.tensor([9.0, 9.0]))
    found = search.finish([0] * 10 + [1] * 10, candidates, torch.ones(20).bool(), torch.arange(20.0))
    # The sixth likeliest of the first says it, none of the second's does: 8 looks and 10.
    assert found == {0} and search.ledger.best[0] == candidates[5].tolist()
    assert sorted(asked) == [(0, i) for i in range(8)] + [(1, i) for i in range(10, 20)]


def test_what_counts_is_the_target_s_first_sentence() -> None:
    batch = text_batch(2)
    search = SuffixSearch(chat_model(), batch, 3, " x", None, target_tokens=2)
    assert search.target.ids.shape[1] == 2
    for i, target in enumerate(batch.targets):
        text = search.chat.decode(search.counted.ids[i, search.counted.mask[i]].tolist())
        assert text == target.split(".")[0] + "."


# --- stages


class Counting:
    """A judge that accepts from the n-th batch on."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.asked = 0

    def judge_batch(self, prompts: list[str], replies: list[str], expected: list[str]) -> list[object]:
        self.asked += 1
        verdict = type("Verdict", (), {"verdict": self.asked >= self.first})
        return [verdict] * len(prompts)

    def __call__(self, prompt: str, reply: str, expected: str) -> bool:
        raise AssertionError("asked one by one")


def gcg(num_tokens: int = 4, num_steps: int = 2, **settings: object) -> GCG:
    return GCG(num_tokens, num_steps=num_steps, width=6, topk=16, **settings)  # type: ignore[arg-type]


def test_an_example_leaves_once_the_judge_is_content_and_passes_add_up() -> None:
    judge = Counting(2)
    stages = [Stage(gcg(stop_at_target=False), repetitions=3)]
    found = AdaptiveGCG(stages, judge, max_new_tokens=4)(chat_model(), text_batch(2), rng())
    assert judge.asked == 2
    # Two stages of two steps (a gradient and six candidates), and one look at the result each.
    assert found.forward_passes.tolist() == [2 * (2 * 7 + 1)] * 2
    assert found.backward_passes.tolist() == [2 * 2] * 2
    assert found.queries is not None
    assert found.queries.tolist() == [2, 2]


def test_a_stage_goes_on_where_the_last_one_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[list[int] | None]] = []
    ended: list[list[list[int]]] = []
    plain = GCG.go_on

    def go_on(
        self: GCG, model: object, batch: object, suffixes: list[list[int] | None], rng: object
    ) -> object:
        given.append(suffixes)
        found = plain(self, model, batch, suffixes, rng)  # type: ignore[arg-type]
        ended.append(found[1])
        return found

    monkeypatch.setattr(GCG, "go_on", go_on)
    stages = [Stage(gcg()), Stage(gcg(5), "last"), Stage(gcg(), "last"), Stage(gcg(), "found")]
    AdaptiveGCG(stages)(chat_model(), text_batch(2), rng())
    # Another length has no last stage; nothing has worked.
    assert given == [[None] * 2, [None] * 2, ended[0], [None] * 2]


def test_what_worked_for_one_request_is_a_start_for_the_next(tmp_path: Path) -> None:
    model, batch = packaged("aligned"), text_batch(4)
    stage = Stage(GCG(5, num_steps=12, width=16, topk=64), "found")
    found = AdaptiveGCG([stage])(model, batch, rng())
    said, _ = says_target(model, batch, found)
    assert sum(said) > 0
    pairs = zip(batch.prompts, found.texts, said, strict=True)
    rows = [row(p, verdict=ok, prompt=p, attacked=t) for p, t, ok in pairs]
    store = StoredSuffixes(stored(tmp_path, *rows))
    # The stored suffixes are at once good for what they were found for.
    again = AdaptiveGCG([stage], warm_start=store)(model, batch, rng())
    after, _ = says_target(model, batch, again)
    assert sum(after) >= sum(said)
    searched = found.forward_passes + found.backward_passes
    hardest = max((i for i, ok in enumerate(said) if ok), key=lambda i: int(searched[i]))
    assert (again.forward_passes + again.backward_passes)[hardest] < searched[hardest]


def test_a_stage_s_own_target_needs_a_judge_and_is_read_from_a_file(tmp_path: Path) -> None:
    batch, model = text_batch(2), chat_model()
    path = tmp_path / "targets.json"
    path.write_text(json.dumps({batch.prompts[0]: ["Of course. One.", "Gladly. Two."]}))
    other = OtherTargets(str(path))
    assert other(model, batch, 2).targets == ("Gladly. Two.", batch.targets[1])
    assert other(model, batch, 3).targets[0] == "Of course. One."
    assert other(model, batch, 1).validate().example_id.equal(batch.example_id)
    with pytest.raises(ValueError, match="AdaptiveGCG.stages: expected targets and a judge"):
        AdaptiveGCG([Stage(gcg(), target=1)], targets=other)
    with pytest.raises(ValueError, match="AdaptiveGCG.stages: expected at least one stage"):
        AdaptiveGCG([])
    attack = AdaptiveGCG([Stage(gcg(), target=1)], TargetPrefix(), other, max_new_tokens=4)
    assert len(attack(model, batch, rng()).texts) == 2


# --- for many requests, and from other runs


def test_a_universal_suffix_is_one_suffix() -> None:
    model, batch = chat_model(), text_batch(3)
    attack = UniversalSuffix(4, num_steps=6, width=16, topk=32, join_every=1)
    found = attack(model, batch, rng())
    suffixes = {text.removeprefix(prompt) for text, prompt in zip(found.texts, batch.prompts, strict=True)}
    assert len(suffixes) == 1
    assert found.loss_curve.shape == (7, 3)
    # The mean is what is lowered; a request may pay for the others.
    assert found.loss_curve.mean(1).min() < found.loss_curve[0].mean()


def test_a_run_s_suffixes_are_replayed_own_ones_first(tmp_path: Path) -> None:
    rows = [
        row("a", verdict=True, prompt="How?", attacked="x How? y"),
        row("b", verdict=True, prompt="Why?", attacked="Why? z"),
        row("c", verdict=False, prompt="Who?", attacked="Who? failed"),
        row("d", verdict=True, prompt="Hidden", attacked="rewritten"),
    ]
    store = StoredSuffixes(stored(tmp_path, *rows))
    draw = random.Random(0)
    assert [v.text for v in Stored(store, "all", 9)("Why?", "", draw)] == ["Why? z", "x Why? y"]
    assert [v.text for v in Stored(store, "others", 9)("Why?", "", draw)] == ["x Why? y"]
    assert [v.text for v in Stored(store, "own", 9)("Where?", "", draw)] == ["Where?"]
    everything = StoredSuffixes(str(tmp_path), judge=None)
    assert len(everything.surroundings()) == 3
    with pytest.raises(ValueError, match=r"no rows of \['pair'\] in"):
        TransferSuffixes(str(tmp_path), ["pair"])(chat_model(), text_batch(1), rng())
    with pytest.raises(ValueError, match="has no verdict of 'human', got"):
        StoredSuffixes(str(tmp_path), judge="human").surroundings()
    with pytest.raises(ValueError, match="no attacked rows in"):
        StoredSuffixes(str(tmp_path / "none")).surroundings()
