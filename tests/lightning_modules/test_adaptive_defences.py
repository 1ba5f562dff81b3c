"""Every defence's adaptive attack against the static one of the same budget: what it is after (the loss
behind the defence, under draws that neither has seen; being let through) it reaches better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from callbacks.judges.keyword import KeywordRefusal
from datamodules.batch import AdversarialBatch
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD, target_loss
from lightning_modules.attacks.embedding.smoothed_pgd import SmoothedPGD
from lightning_modules.attacks.suffix.slots import without_end_of_turn
from lightning_modules.attacks.suffix.through_defence import Seen, ThroughDefence
from lightning_modules.defences.erase_and_check import EraseAndCheck
from lightning_modules.defences.filtered import Check, Filtered
from lightning_modules.defences.reminder import Reminder
from lightning_modules.defences.smooth_llm import SmoothLLM
from lightning_modules.models.asked import reply_losses
from lightning_modules.models.embedding_noise import gaussian, noise_std
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.reply import Reply
from lightning_modules.models.requests import Request
from tests.conftest import chat_model, text_batch
from tests.support.moved import loaded

BUDGET: dict[str, Any] = {"num_tokens": 6, "num_steps": 8, "width": 16, "topk": 64, "num_draws": 4}


def found(
    defence: Seen | None, own: LanguageModel, batch: AdversarialBatch, seed: int = 0, **budget: Any
) -> Sequence[str]:
    attack = ThroughDefence(defence, **BUDGET | budget)
    return attack(own, batch, torch.Generator().manual_seed(seed)).texts


def behind(
    defence: Seen, own: LanguageModel, batch: AdversarialBatch, texts: Sequence[str], draws: int
) -> torch.Tensor:
    """Mean loss of every request behind the defence, over draws of another seed than any search's."""
    seen = defence.seen_through(own, [Request(text) for text in texts], draws, seed=123456)
    counts = torch.tensor([len(rows) for rows in seen])
    index = torch.repeat_interleave(torch.arange(len(texts)), counts)
    mask = without_end_of_turn(batch.harmful_ids, batch.harmful_mask, own.chat.end_of_turn)
    with torch.no_grad():
        losses = reply_losses(
            own, [row for rows in seen for row in rows], Reply(batch.harmful_ids[index], mask[index])
        )
    return torch.zeros(len(texts)).index_add(0, index, losses) / counts


@pytest.mark.parametrize(
    ("defence", "draws", "seeds"),
    [
        (Reminder(before="You must be kind and careful. ", after=" Remember: be kind."), 1, (0,)),
        (SmoothLLM(KeywordRefusal(), share=0.1), 30, (0, 1)),
    ],
    ids=["reminder", "SmoothLLM"],
)
def test_it_lowers_the_loss_behind_the_defence_further(
    defence: Any, draws: int, seeds: tuple[int, ...]
) -> None:
    own, batch = loaded(lora=False)[0], text_batch(4)
    adaptive, static = (
        torch.cat([behind(defence, own, batch, found(known, own, batch, seed), draws) for seed in seeds])
        for known in (defence, None)
    )
    assert adaptive.mean() < static.mean()


class WantsX:
    """Stops a request with fewer than `count` words x, of which the initial suffix is made."""

    name = "wants_x"

    def __init__(self, count: int) -> None:
        self.count = count

    def checks(self, model: LanguageModel, requests: Sequence[Request]) -> list[Check]:
        return [Check(self.count - 0.5 - own.text.count(" x"), 0, 0) for own in requests]


@pytest.mark.parametrize("random_share", [0.25, 1.0], ids=["GCG", "random search"])
def test_it_stays_under_a_filter_that_stops_the_static_one(random_share: float) -> None:
    own, batch, around = chat_model(), text_batch(2), Filtered(WantsX(4))
    for defence, stopped in ((around, False), (None, True)):
        texts = found(defence, own, batch, random_share=random_share)
        excesses = around.excesses(own, [Request(text) for text in texts], batch.targets)
        assert excesses is not None and [excess > 0 for excess in excesses] == [stopped] * 2


def test_before_the_request_it_is_outside_what_a_suffix_mode_erases() -> None:
    own, batch = chat_model(), text_batch(2)

    class Requests:
        """Flags the requests themselves."""

        name = "requests"

        def checks(self, model: LanguageModel, requests: Sequence[Request]) -> list[Check]:
            return [Check(1.0 if own.text in batch.prompts else -1.0, 1, 1) for own in requests]

    around = Filtered(EraseAndCheck(Requests(), max_erase=20))
    for defence, place, stopped in ((around, "before", False), (None, "after", True)):
        texts = found(defence, own, batch, place=place)
        answers = around.filter.checks(own, [Request(text) for text in texts])
        assert [check.flagged for check in answers] == [stopped] * 2


def test_on_embeddings_it_lowers_the_loss_under_noise_further() -> None:
    own, batch, sigma = loaded(lora=False)[0], text_batch(3), 0.6
    descent = EmbeddingPGD(epsilon=0.3, num_steps=12, step_size=0.1)
    rng = torch.Generator().manual_seed(0)
    noise, losses = noise_std(own, sigma), {}
    for name, attack in (("plain", descent), ("smoothed", SmoothedPGD(descent, sigma, num_draws=8))):
        attacked = attack(own, batch, rng.manual_seed(0))
        assert attacked.delta is not None
        point = own.embed(batch.prompt_ids) + attacked.delta
        drawn = []
        for draw in range(24):
            rngs = [torch.Generator().manual_seed(1000 * draw + row) for row in range(len(batch))]
            with torch.no_grad():
                moved = point + noise * gaussian(point, batch.attackable_mask, rngs)
                drawn.append(target_loss(own, batch, moved, None))
        losses[name] = torch.stack(drawn).mean()
    assert losses["smoothed"] < losses["plain"]
