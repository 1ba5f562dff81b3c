"""The refusal direction taken away at random in training: what is removed, from whom, and what is learned."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from datamodules.batch import AdversarialBatch
from lightning_modules.attacks.base import AttackedPrompt, NoAttack
from lightning_modules.attacks.repeat import merged
from lightning_modules.attacks.training.begun_reply import BegunReply
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.hidden_states import conversation_states
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.removal import Removal, projected, removed
from lightning_modules.scoring import score_replies
from tests.conftest import FAMILIES, chat_model, ragged_batch, text_batch, tiny_model
from tests.support.adapters import lora
from tests.support.attacks import random_ablation


def rng(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(batch: AdversarialBatch, share: float = 0.5, layers: int = 2, seed: int = 0) -> Removal:
    """A random removal for a batch."""
    g = rng(seed)
    size = sum(own.shape[1] for own in (batch.prompt_ids, batch.harmful_ids, batch.safe_ids))
    where = {layer: torch.rand(len(batch), size, generator=g) < share for layer in range(layers)}
    return Removal({layer: torch.randn(32, generator=g) for layer in where}, where)


def under(model: LanguageModel, batch: AdversarialBatch, removal: Removal | None) -> AttackedPrompt:
    return replace(NoAttack()(model, batch), removal=removal)


def test_the_projection_by_hand() -> None:
    """r = (3, 4) / 5 and x = (5, 10): r.x = 11, x - 11 r = (5 - 6.6, 10 - 8.8) = (-1.6, 1.2), orthogonal to
    r; the token that was not chosen stays."""
    states = torch.tensor([[[5.0, 10.0], [5.0, 10.0]]])
    found = projected(states, torch.tensor([0.6, 0.8]), torch.tensor([[True, False]]))
    torch.testing.assert_close(found, torch.tensor([[[-1.6, 1.2], [5.0, 10.0]]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_tokens_lose_the_direction_and_others_keep_it(family: str) -> None:
    """Of the last layer's output; the first layer's direction comes back by what later layers add."""
    model, batch = LanguageModel(tiny_model(family)), ragged_batch()
    removal = drawn(batch)
    last = Removal({1: removal.vectors[1]}, {1: removal.where[1]})
    with torch.no_grad():
        (plain,) = conversation_states(model, batch.prompt_ids, batch.prompt_mask, [1])
        with removed(model, last):
            (found,) = conversation_states(model, batch.prompt_ids, batch.prompt_mask, [1])
    for row, mask in enumerate(batch.prompt_mask):
        own, before = found[row][mask], plain[row][mask]
        chosen = last.where[1][row, : len(own)]
        along = own @ last.vectors[1]
        assert chosen.any() and not chosen.all()
        assert along[chosen].abs().max() < 1e-4
        torch.testing.assert_close(own[~chosen], before[~chosen])
        assert (before[chosen] @ last.vectors[1]).abs().max() > 1e-2
    with torch.no_grad():
        after = conversation_states(model, batch.prompt_ids, batch.prompt_mask, [1])[0]
    assert torch.equal(after, plain)


def test_replies_lose_it_at_their_places_in_the_conversation() -> None:
    """Both replies of one shared pass, against every row by itself: a pass a reply, a loop over layers."""
    model, batch = LanguageModel(tiny_model(dtype=torch.float64)), ragged_batch()
    removal = drawn(batch)
    scores = score_replies(model, batch, under(model, batch, removal))
    decoder = causal_lm(model.module).get_decoder()
    for row in range(len(batch)):
        for ids, mask, found in (
            (batch.safe_ids, batch.safe_mask, scores.safe_log_probs),
            (batch.harmful_ids, batch.harmful_mask, scores.harmful_log_probs),
        ):
            reply, prompt = ids[row][mask[row]], batch.prompt_ids[row][batch.prompt_mask[row]]
            states = model.embed(torch.cat([prompt, reply]))[None]
            positions = torch.arange(states.shape[1])[None]
            turned = decoder.rotary_emb(states, positions)
            for number, layer in enumerate(decoder.layers):
                out = layer(states, position_embeddings=turned, position_ids=positions)
                states = (out[0] if isinstance(out, tuple) else out).clone()
                unit = removal.vectors[number].double() / removal.vectors[number].double().norm()
                for place in range(states.shape[1]):
                    if removal.where[number][row, place]:
                        states[0, place] -= (states[0, place] @ unit) * unit
            logits = causal_lm(model.module).get_output_embeddings()(decoder.norm(states))[0]
            expected = logits.log_softmax(1)[len(prompt) - 1 : -1].gather(1, reply[:, None]).squeeze(1)
            torch.testing.assert_close(found[row][mask[row]], expected, atol=1e-5, rtol=0)


def test_its_runs_are_not_compared() -> None:
    """Merged results would train without what each of them removes, unsaid."""
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    attacked = under(model, batch, drawn(batch))
    with pytest.raises(ValueError, match=r"Repeat\.attack: .* removes directions from the model"):
        merged(attacked, attacked, [*range(len(batch))], torch.zeros(len(batch), dtype=torch.bool))


def gradients(model: LanguageModel, batch: AdversarialBatch, removal: Removal) -> dict[str, Tensor]:
    """Of a loss on both replies; the context of the removal is left before the backward pass."""
    scores = score_replies(model, batch, under(model, batch, removal))
    (scores.safe_log_probs.sum() - scores.harmful_log_probs.sum()).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_finite_differences_and_of_recomputed_layers() -> None:
    """A bias on the first layer's output, along the direction: chosen tokens lose all of it, so that its
    slope is that of the others alone. Recomputing layers in the backward pass changes no gradient."""
    batch = ragged_batch()
    removal = drawn(batch)
    module = tiny_model(dtype=torch.float64)
    found = gradients(LanguageModel(module), batch, removal)
    name = "model.layers.0.mlp.down_proj.weight"
    weight, step = dict(module.named_parameters())[name], 1e-2
    unit = removal.vectors[0].double() / removal.vectors[0].double().norm()
    towards = unit[:, None] * torch.randn(weight.shape[1], generator=rng(), dtype=torch.float64)[None]
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            weight += sign * step * towards
            model = LanguageModel(module)
            scores = score_replies(model, batch, under(model, batch, removal))
            values.append(float(scores.safe_log_probs.sum() - scores.harmful_log_probs.sum()))
    slope = (values[0] - values[1]) / (2 * step)
    assert float((found[name] * towards).sum()) == pytest.approx(slope, rel=1e-3)
    recomputing = tiny_model(dtype=torch.float64).train()
    recomputing.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(LanguageModel(recomputing), batch, removal)
    for own, gradient in found.items():
        torch.testing.assert_close(again[own], gradient, atol=1e-9, rtol=1e-6)


def test_a_direction_taken_everywhere_learns_nothing_along_it() -> None:
    model, batch = LanguageModel(tiny_model(dtype=torch.float64)), ragged_batch()
    removal = drawn(batch, share=2.0)
    found = gradients(model, batch, removal)["model.layers.1.mlp.down_proj.weight"]
    assert (removal.vectors[1].double() @ found).abs().max() < 1e-6 * found.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn_in_any_precision(dtype: torch.dtype) -> None:
    batch = ragged_batch()
    module = lora(tiny_model(dtype=dtype))
    found = gradients(LanguageModel(module), batch, drawn(batch))
    assert found and all(bool(gradient.isfinite().all()) for gradient in found.values())
    assert any(gradient.abs().max() > 0 for gradient in found.values())
    states = torch.randn(2, 3, 32, generator=rng()).to(dtype)
    unit = torch.nn.functional.normalize(torch.randn(32, generator=rng()), dim=0)
    left = projected(states, unit, torch.ones(2, 3, dtype=torch.bool)).float() @ unit
    assert left.abs().max() < (0.03 if dtype == torch.bfloat16 else 1e-5)


def shares(seeds: int = 60, **settings: float) -> list[Tensor]:
    """Of many draws: by example, layer and token, whether it loses the direction."""
    attack, model, batch = random_ablation(**settings), chat_model(), text_batch(2)
    found = []
    for seed in range(seeds):
        removal = attack(model, batch, rng(seed)).removal
        assert removal is not None
        size = int(batch.prompt_mask[0].sum())
        rows = [
            removal.where[n][0, :size] if n in removal.where else torch.zeros(size).bool() for n in (0, 1)
        ]
        found.append(torch.stack(rows))
    return found


def test_examples_layers_and_tokens_are_drawn_as_often_as_is_said() -> None:
    whole = shares(examples=0.5, skipped=0.5)
    assert not any(bool(own[0].any()) for own in whole)  # the first half of the layers
    assert all(bool(own[1].all()) or not bool(own[1].any()) for own in whole)
    assert sum(bool(own[1].all()) for own in whole) / len(whole) == pytest.approx(0.5, abs=0.2)
    deep = shares(examples=1.0, layers=0.5, tokens=0.5, skipped=0.0, every=None, per_layer=False)
    layers = torch.stack([own.any(1) for own in deep]).float()
    assert layers.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.2)
    assert bool((layers[:, 0] != layers[:, 1]).any())
    tokens = torch.cat([own[1].float() for own in deep if own[1].any()])
    assert float(tokens.mean()) == pytest.approx(0.5, abs=0.1)


def test_an_example_loses_the_same_beside_others() -> None:
    attack, model = random_ablation(examples=1.0, tokens=0.5, skipped=0.0), chat_model()
    together, alone = (attack(model, batch, rng()).removal for batch in (text_batch(3), text_batch(1, 2)))
    assert together is not None and alone is not None
    for layer, own in alone.where.items():
        width = own.shape[1]
        assert torch.equal(together.where[layer][2, :width], own[0])
        assert not together.where[layer][2, width:].any()


def test_directions_are_found_anew_when_they_are_due_and_kept_in_a_checkpoint() -> None:
    attack, model, batch = random_ablation(every=2, examples=1.0), chat_model(), text_batch(2)
    removals = []
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(attack.state_dict())
        removal = attack(model, batch, rng()).removal
        assert removal is not None
        removals.append(removal.vectors[1])
        with torch.no_grad():  # a step of training
            causal_lm(model.module).get_decoder().layers[0].mlp.down_proj.weight.mul_(1.5)
    assert torch.equal(removals[0], removals[1]) and torch.equal(removals[2], removals[3])
    assert not torch.equal(removals[1], removals[2])
    resumed = random_ablation(every=2, examples=1.0)
    resumed.load_state_dict(state)
    resumed._batches = 3  # between two findings nothing is looked for
    kept = resumed(model, batch, rng()).removal
    assert kept is not None and torch.equal(kept.vectors[1], removals[1])


def test_what_finding_costs_is_counted_and_only_where_something_is_found() -> None:
    attack, model, batch = random_ablation(every=2), chat_model(), text_batch(3)
    first, second = (attack(model, batch, rng()).forward_passes.tolist() for _ in range(2))
    assert first == [3, 3, 3]  # 4 + 4 requests on 3 examples
    assert second == [0, 0, 0]


def test_behind_a_begun_reply_places_are_counted_through_it() -> None:
    """The begun tokens belong to the prompt then; the removal reaches the end of the safe reply."""
    model, batch = chat_model(), text_batch(2)
    attack = BegunReply(random_ablation(examples=1.0, skipped=0.0), longest=3, probability=1.0)
    attacked = attack(model, batch, rng())
    assert all(attacked.forced) and attacked.removal is not None
    lengths = sum(own.sum(1) for own in (batch.prompt_mask, batch.harmful_mask, batch.safe_mask))
    assert attacked.removal.where[1].sum(1).tolist() == torch.as_tensor(lengths).tolist()
    scores = score_replies(model, batch, attacked)
    assert bool(scores.safe_log_probs.isfinite().all())


def test_a_part_of_the_batch_loses_what_is_its_own_and_nothing_beyond_what_was_drawn() -> None:
    model, batch = LanguageModel(tiny_model()), ragged_batch()
    removal = drawn(batch)
    part = under(model, batch, removal).select(1, 3).removal
    assert part is not None and part.vectors is removal.vectors
    assert all(torch.equal(part.where[layer], own[1:3]) for layer, own in removal.where.items())
    short = Removal({1: removal.vectors[1]}, {1: torch.ones(len(batch), 4, dtype=torch.bool)})
    with torch.no_grad(), removed(model, short):
        (states,) = conversation_states(model, batch.prompt_ids, batch.prompt_mask, [1])
    along = (states[0][batch.prompt_mask[0]] @ removal.vectors[1]).abs()
    assert along[:4].max() < 1e-4 < 1e-3 < along[4:].min()


def test_the_same_requests_on_both_sides_have_no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = random_ablation()
    monkeypatch.setattr(attack.finder, "differences", lambda model: {0: torch.zeros(4), 1: torch.zeros(4)})
    with pytest.raises(ValueError, match=r"RandomAblation\.finder: .* got a difference of length 0"):
        attack(chat_model(), text_batch(1), rng())
