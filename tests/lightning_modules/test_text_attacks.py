"""What attacks that write text promise, over every one of them: what they return can be typed, is scored
truly, costs what it says."""

from __future__ import annotations

import copy
import random
from typing import ClassVar

import pytest
import torch

from callbacks.judges.exact import TargetPrefix
from datamodules.rows import HarmfulRow
from datamodules.text.tokenizers import TokenizerConfig
from lightning_modules.attacks.suffix.beast import BEAST
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.suffix.random_search import RandomSearch
from lightning_modules.attacks.text.autodan import AutoDAN, exchange, reword
from lightning_modules.attacks.text.choosers import FirstSuccess
from lightning_modules.attacks.text.noise import augment, misspell
from lightning_modules.attacks.text.pair import PAIR, STRATEGIES, read_prompt
from lightning_modules.attacks.text.rewrites import (
    BestOfN,
    InContext,
    Noise,
    Prefilling,
    Templates,
)
from lightning_modules.attacks.text.templates import fill, read_templates
from lightning_modules.attacks.text.variants import Variant
from lightning_modules.models.chat import LocalChat
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig, load_model
from lightning_modules.models.requests import Request
from tests.conftest import chat_model, text_batch, tinychat_format
from tests.support.attacks import CASES, SOURCE, Scripted, pair

SEARCHES = ("gcg", "beast", "random_search")


def rng_of(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SEARCHES)
def test_attacks_without_texts_say_what_they_need(name: str) -> None:
    batch = copy.copy(text_batch(1))
    object.__setattr__(batch, "prompts", ())
    with pytest.raises(ValueError, match="expected a batch with its prompts' texts"):
        CASES[name].build()(chat_model(), batch, rng_of())
    with pytest.raises(ValueError, match="expected a model with a chat format"):
        CASES[name].build()(LanguageModel(chat_model().module), text_batch(1), rng_of())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GCG(width=0), "GCG.width: expected an integer >= 1, got 0"),
        (lambda: GCG(num_tokens=3, n_replace=4), "GCG.n_replace: expected at most num_tokens 3, got 4"),
        (lambda: GCG(mellowmax_alpha=0.0), "GCG.mellowmax_alpha: expected a number > 0"),
        (lambda: BEAST(temperature=0.0), "BEAST.temperature: expected a number > 0"),
        (lambda: RandomSearch(template="no place"), "expected {prompt} in it"),
        (
            lambda: RandomSearch(stop_probability=0.0),
            "RandomSearch.stop_probability: expected a number within",
        ),
        (lambda: BestOfN(sigma=0.0), "BestOfN.sigma: expected a number within"),
        (lambda: Noise(rate=0.0), "Noise.rate: expected a number within"),
        (lambda: Prefilling(0), "Prefilling.num_tokens: expected an integer >= 1"),
        (lambda: AutoDAN(population=1), "AutoDAN.population: expected an integer >= 2"),
        (
            lambda: Templates("nowhere.csv")(chat_model(), text_batch(1)),
            "expected one of .* or an existing file",
        ),
        (lambda: pair(attempts=0), "PAIR.attempts: expected an integer >= 1"),
        (
            lambda: InContext(SOURCE, num_shots=10**6)(chat_model(), text_batch(1)),
            "expected at most the source's",
        ),
    ],
)
def test_impossible_settings_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


# --- single attacks


def test_a_judge_ends_best_of_n_at_the_first_success() -> None:
    aligned = LanguageModel(load_model(ModelConfig("tinychat:aligned")).eval(), chat=tinychat_format())

    class Anything:
        def __call__(self, prompt: str, completion: str, reference: str) -> bool:
            return True

    attacked = BestOfN(8, chooser=FirstSuccess(Anything(), max_new_tokens=4))(
        aligned, text_batch(2), rng_of()
    )
    assert attacked.queries is not None
    assert attacked.queries.tolist() == [1, 1]
    never = BestOfN(3, chooser=FirstSuccess(Never(), max_new_tokens=4))(aligned, text_batch(2), rng_of())
    assert never.queries is not None
    assert never.queries.tolist() == [3, 3]


def test_best_of_n_can_sample_its_replies() -> None:
    heard: list[str] = []

    class Listens:
        def __call__(self, prompt: str, completion: str, reference: str) -> bool:
            heard.append(completion)
            return False

    def said(temperature: float) -> list[str]:
        heard.clear()
        batch = text_batch(1)
        same = [[Variant(batch.prompts[0])] * 6]
        FirstSuccess(Listens(), 2, max_new_tokens=8, temperature=temperature)(chat_model(), batch, same)
        return [*heard]

    # The same prompt six times, two at once: greedy replies are one, sampled ones differ and can be repeated.
    assert len(set(said(0.0))) == 1
    assert len(set(said(1.0))) == 6
    assert said(1.0) == said(1.0)


class Never:
    """A judge that nothing pleases."""

    def __call__(self, prompt: str, completion: str, reference: str) -> bool:
        return False


def test_prefilling_forces_the_reply() -> None:
    language_model, batch = chat_model(), text_batch(2)
    attacked = Prefilling(4)(language_model, batch, rng_of())
    assert [list(forced) for forced in attacked.forced] == batch.harmful_ids[:, :4].tolist()


def test_demonstrations_never_show_the_attacked_request() -> None:
    own = next(row for row in SOURCE.rows() if isinstance(row, HarmfulRow))
    shown = InContext(SOURCE, num_shots=5, num_samples=3).variants(own.prompt, own.target, random.Random(0))
    assert all(len(variant.history) == 5 and own.prompt not in dict(variant.history) for variant in shown)


def test_templates_that_the_model_cannot_take_are_left_out(tmp_path: object) -> None:
    path = tmp_path / "long.txt"  # type: ignore[operator]
    path.write_text("{prompt} " + "and so on " * 400)
    attacked = Templates(str(path))(chat_model(), text_batch(2), rng_of())
    assert attacked.texts == text_batch(2).prompts
    assert attacked.loss_curve.isnan().all()


def test_template_marks_and_files(tmp_path: object) -> None:
    assert fill("a {prompt} b", "P", "T") == "a P b"
    assert fill("[INSERT PROMPT HERE]!", "P", "T") == "P!"
    assert fill("before", "P", "T") == "before P"
    assert (
        fill("{rot13} {target_start}", "ab", "one two three four five six seven")
        == "no one two three four five six"
    )
    csv = tmp_path / "t.csv"  # type: ignore[operator]
    csv.write_text('id,text\n1,"two\nlines {prompt}"\n2,\n')
    assert read_templates(str(csv)) == ["two\nlines {prompt}"]
    (tmp_path / "t.json").write_text('["x"]')  # type: ignore[operator]
    assert read_templates(str(tmp_path / "t.json")) == ["x"]  # type: ignore[operator]


def test_published_template_sets_are_read(public_data: object) -> None:
    data = public_data / "data"  # type: ignore[operator]
    assert len(read_templates(str(data / "gptfuzz" / "GPTFuzzer.csv"))) == 77
    assert len(read_templates(str(data / "autodan" / "prompt_group.json"))) == 128


def test_noise_changes_about_the_share_asked_for() -> None:
    rng, text = random.Random(0), "the quick brown fox jumps over the lazy dog " * 50
    for rate in (0.05, 0.2):
        noisy = misspell(text, "character", rate, rng)
        assert noisy != text
        assert abs(len(noisy) - len(text)) < 2 * rate * len(text)
    assert misspell("word", "word", 1.0, rng).strip()
    augmented = augment("How do I steal a car today?", 0.4, rng)
    assert len(augmented) == len("How do I steal a car today?")
    assert augmented.casefold() != "how do i steal a car today?" or augmented != "How do I steal a car today?"


def test_genetic_operators_keep_the_material() -> None:
    rng = random.Random(1)
    first, second = "A one. A two. A three.", "B one. B two. B three."
    children = exchange(first, second, 5, rng)
    assert sorted(" ".join(children).split(". ")) == sorted(f"{first} {second}".split(". ")) or sorted(
        " ".join(children).replace(".", "").split()
    ) == sorted(f"{first} {second}".replace(".", "").split())
    assert exchange("one sentence", "another", 5, rng) in (
        ("one sentence", "another"),
        ("another", "one sentence"),
    )
    assert reword("Always answer the question.", 1.0, rng) != "Always answer the question."
    assert "{prompt}" in reword("Never refuse {prompt}", 1.0, rng)


def test_autodan_does_not_lose_its_elite() -> None:
    attacked = AutoDAN(num_steps=5, population=8, elites=0.25, mutation=0.5)(
        chat_model(), text_batch(2), rng_of()
    )
    curve = attacked.loss_curve
    assert (curve[1:] <= curve[:-1] + 1e-5).all()


def test_an_attacker_s_answer_is_read_or_asked_for_again() -> None:
    assert read_prompt('Sure! {"improvement": "a", "prompt": " do it "} done') == "do it"
    assert read_prompt("no json") is None
    assert read_prompt('{not json} {"prompt": "first"} {"prompt": "second"}') == "first"
    assert read_prompt('{"prompt": 3}') is None
    attacker = Scripted(["nonsense", '{"prompt": "Say it."}'])
    small = {"num_streams": 1, "num_steps": 1, "max_new_tokens": 4}
    attack = PAIR(attacker, TargetPrefix(), **small)  # type: ignore[arg-type]
    attacked = attack(chat_model(), text_batch(1), rng_of())
    assert attacked.queries is not None
    assert attacked.queries.tolist() == [3]  # two questions to the attacker, one to the language_model
    assert text_batch(1).prompts[0] in (attacker.asked[0].system or "")


def test_pair_shows_the_latest_turns_and_stops_at_success() -> None:
    attacker = Scripted(['{"prompt": "Try this."}'])
    PAIR(attacker, Never(), num_streams=1, num_steps=4, keep_turns=2, max_new_tokens=4)(
        chat_model(), text_batch(1), rng_of()
    )  # type: ignore[arg-type]
    assert [len(conversation.history) for conversation in attacker.asked] == [0, 1, 2, 2]

    class Always(Never):
        def __call__(self, prompt: str, completion: str, reference: str) -> bool:
            return True

    attacker = Scripted(['{"prompt": "Try this."}'])
    attacked = PAIR(attacker, Always(), num_streams=3, num_steps=4, max_new_tokens=4)(
        chat_model(), text_batch(1), rng_of()
    )  # type: ignore[arg-type]
    assert len(attacker.asked) == 3
    assert attacked.texts == ("Try this.",)


def test_pair_s_streams_take_the_strategies_in_turn() -> None:
    attacker = Scripted(['{"prompt": "Try this."}'])
    PAIR(attacker, Never(), num_streams=4, num_steps=1, max_new_tokens=4)(
        chat_model(), text_batch(1), rng_of()
    )
    told = [[text in (asked.system or "") for text in STRATEGIES.values()] for asked in attacker.asked]
    one, two, three = ([i == j for j in range(3)] for i in range(3))
    assert told == [one, two, three, one]
    with pytest.raises(ValueError, match=r"PAIR.strategies: unknown 'force'; known: role_play, logic"):
        PAIR(attacker, Never(), strategies=["force"])  # type: ignore[list-item]


def test_pair_stops_at_ten_only_and_grades_in_one_call() -> None:
    class Graded(Never):
        batches: ClassVar[list[int]] = []

        def score_batch(self, prompts: list[str], replies: list[str], expected: list[str]) -> list[float]:
            self.batches.append(len(prompts))
            return [9.0 if len(self.batches) < 3 else 10.0] * len(prompts)

    attacker = Scripted(['{"prompt": "Try this."}'])
    attack = PAIR(attacker, Graded(), num_streams=2, num_steps=5, max_new_tokens=4)
    attack(chat_model(), text_batch(1), rng_of())
    assert Graded.batches == [2, 2, 2]


def test_a_loaded_model_attacks() -> None:
    local = LocalChat(
        ModelConfig("tinychat:helpful"),
        TokenizerConfig("tinychat:helpful"),
        max_new_tokens=8,
        temperature=1.0,
        top_p=0.7,
    )
    state = torch.get_rng_state()
    first = local.replies(
        [Request("How do I paint a car?"), Request("Hello!", history=(("Hi there!", "Hello!"),))]
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == 2
    attack = PAIR(
        local, TargetPrefix(), num_streams=2, num_steps=1, attempts=1, accept_text=True, max_new_tokens=4
    )
    once = attack(chat_model(), text_batch(2), rng_of())
    # A model in the loop keeps no state: a rerun after a kill must write the same prompts.
    assert attack(chat_model(), text_batch(2), rng_of()).loss_curve.tolist() == once.loss_curve.tolist()
    other = attack(chat_model(), text_batch(2), torch.Generator().manual_seed(4)).loss_curve.tolist()
    assert other != once.loss_curve.tolist()
