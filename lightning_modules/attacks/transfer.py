"""What an attack does to a harmful request, done to benign prompts: a model that refuses whatever carries an
attack's marks has learned the marks, not harm.

A transfer optimises nothing for the benign prompt: suffixes and other frames are those found on other
requests, rewritings and points of a ball are drawn at random. The one exception here is `TowardsRefusal`, a
search for a perturbation that makes the model refuse; benign_search.py has another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import AdversarialBatch, EvaluationBatch, pad
from datamodules.rows import HarmfulRow, example_id
from datamodules.text.chat_format import Attackable
from datamodules.text.encoding import EncodedHarmful, adversarial_batch
from lightning_modules.attacks.base import Attack, AttackedPrompt, draw_seed, example_rngs
from lightning_modules.attacks.embedding.latent import LatentPGD
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.refusal_direction import DirectionalAblation
from lightning_modules.attacks.embedding.smoothed_pgd import SmoothedPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt, append_slots
from lightning_modules.attacks.ledger import Ledger
from lightning_modules.attacks.repeat import Repeat
from lightning_modules.attacks.suffix.slots import without_end_of_turn
from lightning_modules.attacks.text.pair import PAIR
from lightning_modules.attacks.text.rewrites import Rewrite
from lightning_modules.attacks.text.transfer import TransferSuffixes
from lightning_modules.attacks.text.variants import Variant, Variants
from lightning_modules.models.decoder import text_config
from lightning_modules.models.language_model import LanguageModel


@dataclass(frozen=True)
class Found:
    """What an attack has found on the harmful requests of the same run."""

    sent: Sequence[tuple[str, str]]
    """(request, what was sent in its place), for attacks that can be typed."""
    attacked: Callable[[], tuple[AdversarialBatch, AttackedPrompt]]
    """Some of the requests and the attack's result on them; asked only by transfers that need embeddings,
    since after a resumption it attacks again."""
    targets: Sequence[str]
    """Harmful targets; a benign prompt without an expected reply borrows one where a reply is forced."""
    refusals: Sequence[str]
    """Safe replies of the requests."""
    attackable: Attackable = "user"


class NothingCarried(ValueError):
    """The attack left nothing that could be put around another request."""


class Transfer(Protocol):
    """Does to a batch of benign prompts what an attack does to harmful requests.

    Raises: NothingCarried where what the attack found cannot be separated from its requests.
    """

    def __call__(
        self, model: LanguageModel, batch: EvaluationBatch, found: Found, rng: torch.Generator
    ) -> AttackedPrompt: ...


def transfer_of(attack: Attack) -> Transfer | None:
    """How an attack is done to benign prompts; None where it cannot be (a dialogue about one request).

    Attacks that are not named here are searches over text: what they put around a request is put around
    another one.
    """
    match attack:
        case Repeat():
            return transfer_of(attack.attack)
        case TransferSuffixes():
            return Surroundings()
        case Rewrite():
            return Rewritten(attack.variants)
        case SoftPrompt():
            return FreeSuffix(attack.num_tokens, attack.init_token_id)
        case EmbeddingPGD():
            return RandomPoint(attack) if attack.epsilon is not None else None
        case DirectionalAblation():
            return Ablated(attack)
        case SmoothedPGD():
            return transfer_of(attack.descent)
        case LatentPGD():
            bounded = attack.descent.epsilon is not None
            return RandomPoint(attack.descent, attack.layers, attack.embedding) if bounded else None
        case PAIR():
            return None
    return Surroundings()


def has_ball(attack: Attack) -> bool:
    """Whether the attack moves the prompt's own embeddings within a radius."""
    inner = attack.attack if isinstance(attack, Repeat) else attack
    return isinstance(transfer_of(inner), RandomPoint)


def turned_of(attack: Attack) -> Transfer | None:
    """The attack turned towards a refusal of benign prompts; None for attacks on texts."""
    if isinstance(attack, DirectionalAblation):
        return DirectionAdded(attack)
    return TowardsRefusal(attack) if has_ball(attack) else None


@dataclass
class Surroundings:
    """What stands before and after a request in what was sent: suffixes, prefixes, templates. Each benign
    prompt gets those of another request, drawn at random, won or not."""

    def __call__(
        self, model: LanguageModel, batch: EvaluationBatch, found: Found, rng: torch.Generator
    ) -> AttackedPrompt:
        """Raises: NothingCarried where no request stands in what was sent for it."""
        frames = [frame for frame in (around(*pair) for pair in found.sent) if frame is not None]
        if not frames:
            raise NothingCarried("what was sent does not contain the request")
        choices = [
            [Variant(before + text.strip() + after) for before, after in own.sample(frames, len(frames))]
            for text, own in zip(_texts(batch, found), _randoms(batch, rng), strict=True)
        ]
        return written(model, batch, choices, found)


@dataclass
class Rewritten:
    """The same rewriting of the benign prompt, one of its variants at random: nobody chooses the kindest."""

    variants: Variants

    def __call__(
        self, model: LanguageModel, batch: EvaluationBatch, found: Found, rng: torch.Generator
    ) -> AttackedPrompt:
        targets = _targets(batch, found.targets)
        choices = []
        for text, target, own in zip(_texts(batch, found), targets, _randoms(batch, rng), strict=True):
            variants = list(self.variants(text, target, own))
            choices.append(own.sample(variants, len(variants)))
        return written(model, batch, choices, found)


@dataclass
class RandomPoint:
    """A random point of the attack's own ball at every attackable position (and layer): its radius without
    its aim."""

    descent: EmbeddingPGD
    layers: Sequence[int] = ()
    embedding: bool = True

    def __call__(
        self, model: LanguageModel, batch: EvaluationBatch, found: Found, rng: torch.Generator
    ) -> AttackedPrompt:
        plain = with_targets(model, batch, found.refusals, found.attackable)
        radius, _ = self.descent.lengths(model)
        assert radius is not None, "an attack without a ball has no random point"
        width = model.embed(plain.prompt_ids[:1, :1]).shape[-1]
        sites = len(self.layers) + self.embedding
        noise = torch.zeros(sites, *plain.prompt_ids.shape, width)
        for row, own in enumerate(example_rngs(plain, rng)):
            where = plain.attackable_mask[row].cpu()
            for site in range(sites):
                noise[site, row, where] = self.descent.ball.random_point(
                    (int(where.sum()), width), radius, own
                )
        parts = list(noise.to(plain.prompt_ids.device))
        delta = parts.pop(0) if self.embedding else None
        distance = (self.descent.ball.size(noise).amax((0, 2)) / radius.cpu()).to(plain.prompt_ids.device)
        unperturbed = Ledger(len(plain), plain.prompt_ids.device)
        attacked = unperturbed.attacked(plain.prompt_ids, plain.prompt_mask, delta, distance)
        return replace(attacked, layers=dict(zip(self.layers, parts, strict=True)))


@dataclass
class FreeSuffix:
    """Free embeddings after the prompt, those found for another request."""

    num_tokens: int
    init_token_id: int

    def __call__(
        self, model: LanguageModel, batch: EvaluationBatch, found: Found, rng: torch.Generator
    ) -> AttackedPrompt:
        donors, attacked = found.attacked()
        suffixes = self._suffixes(donors, attacked)
        plain = with_targets(model, batch, found.refusals, found.attackable)
        wide = append_slots(plain, self.num_tokens, self.init_token_id)
        delta = suffixes.new_zeros(*wide.prompt_ids.shape, suffixes.shape[-1])
        chosen = [own.randrange(len(suffixes)) for own in _randoms(batch, rng)]
        delta[wide.attackable_mask] = suffixes[chosen].flatten(0, 1)
        return Ledger(len(plain), plain.prompt_ids.device).attacked(wide.prompt_ids, wide.prompt_mask, delta)

    def _suffixes(
        self, donors: AdversarialBatch, attacked: AttackedPrompt
    ) -> Float[Tensor, "donor suffix dim"]:
        """What was added to the slots of each donor."""
        slots = append_slots(donors, self.num_tokens, self.init_token_id).attackable_mask
        assert attacked.delta is not None, "a soft prompt has embeddings"
        return attacked.delta[slots].view(len(donors), self.num_tokens, -1)


@dataclass
class TowardsRefusal:
    """The attack itself, with a refusal in the place of the harmful target: how far a benign prompt is from
    being refused, found by a search and not by what attacks leave behind."""

    attack: Attack

    def __call__(
        self, model: LanguageModel, batch: EvaluationBatch, found: Found, rng: torch.Generator
    ) -> AttackedPrompt:
        return self.attack(model, with_targets(model, batch, found.refusals, found.attackable), rng)


@dataclass
class Ablated:
    """The same direction removed while the model reads a benign prompt: what the attack costs otherwise."""

    attack: DirectionalAblation

    def __call__(
        self, model: LanguageModel, batch: EvaluationBatch, found: Found, rng: torch.Generator
    ) -> AttackedPrompt:
        vector = self.attack.direction(model).vector
        plain = Ledger(len(batch), batch.prompt_ids.device)
        return replace(plain.attacked(batch.prompt_ids, batch.prompt_mask), ablated=vector)


@dataclass
class DirectionAdded:
    """The direction added, as long as the means are apart, to the output of its layer at every position of a
    benign prompt: whether it is refusal that lies along it."""

    attack: DirectionalAblation

    def __call__(
        self, model: LanguageModel, batch: EvaluationBatch, found: Found, rng: torch.Generator
    ) -> AttackedPrompt:
        own = self.attack.direction(model)
        plain = Ledger(len(batch), batch.prompt_ids.device)
        moved = own.vector.expand(*batch.prompt_ids.shape, -1)
        return replace(plain.attacked(batch.prompt_ids, batch.prompt_mask), layers={own.layer: moved})


def around(request: str, sent: str) -> tuple[str, str] | None:
    """What stands before and after the request; None where the request itself is not there."""
    before, here, after = sent.partition(request.strip())
    return (before, after) if here else None


def written(
    model: LanguageModel,
    batch: EvaluationBatch,
    choices: Sequence[Sequence[Variant]],
    found: Found,
) -> AttackedPrompt:
    """Each prompt's first variant that can be sent, as ids; what is forced begins the expected reply, or a
    harmful target where there is none.

    Raises: ValueError where a prompt has no such variant.
    """
    chat, prompts, forced, chosen = model.chat, [], [], []
    # A model that states no limit (ALiBi, recurrent ones) gets one that no prompt reaches.
    limit = getattr(text_config(model.module), "max_position_embeddings", None) or 1 << 20
    for row, (variants, target) in enumerate(zip(choices, _targets(batch, found.targets), strict=True)):
        history = batch.histories[row] if batch.histories else ()
        _, envelope = batch.written(row, found.attackable)
        for variant in variants:
            try:
                tokens = envelope.prompt(chat, variant.text, (*variant.history, *history))
                start = _start(chat.reply(tokens, target), chat.end_of_turn, variant.forced)
            except ValueError:
                continue
            if len(tokens.ids) + len(start) < limit:
                prompts.append(tokens.ids + start)
                forced.append(tuple(start))
                chosen.append(replace(variant, history=(*variant.history, *history)))
                break
        else:
            raise ValueError(
                f"{batch.keys[row]}: what the attack puts around a request cannot be sent with this prompt "
                f"(the template refuses it, or the model's {limit} positions are too few); leave the row out"
            )
    ids, mask = (tensor.to(model.device) for tensor in pad(prompts, "left"))
    return Ledger(len(batch), model.device).attacked(
        ids,
        mask,
        texts=[variant.text for variant in chosen],
        histories=[variant.history for variant in chosen],
        forced=forced if any(forced) else (),
    )


def with_targets(
    model: LanguageModel, batch: EvaluationBatch, targets: Sequence[str], attackable: Attackable
) -> AdversarialBatch:
    """Benign prompts as a batch that an attack takes, with these texts in turn as what it aims at."""
    aims = [targets[example_id(key) % len(targets)] for key in batch.keys]
    return aimed(model, batch, aims, attackable)


def aimed(
    model: LanguageModel, batch: EvaluationBatch, aims: Sequence[str], attackable: Attackable
) -> AdversarialBatch:
    """Prompts as a batch that an attack takes, each with its own text to aim at."""
    chat, rows = model.chat, []
    for i, (key, prompt, target) in enumerate(zip(batch.keys, batch.prompts, aims, strict=True)):
        text, envelope = batch.written(i, attackable)
        tokens = envelope.prompt(chat, text, batch.histories[i] if batch.histories else ())
        aim = chat.reply(tokens, target)
        rows.append(EncodedHarmful(HarmfulRow(key, prompt, target, target, key), tokens, aim, aim))
    return adversarial_batch(rows, attackable).to(model.device)


def _texts(batch: EvaluationBatch, found: Found) -> list[str]:
    """The part of every prompt that an attacker writes."""
    return [batch.written(row, found.attackable)[0] for row in range(len(batch))]


def _targets(batch: EvaluationBatch, borrowed: Sequence[str]) -> list[str]:
    """The expected reply of every prompt, or one of the borrowed texts."""
    return [
        expected or borrowed[example_id(key) % len(borrowed)]
        for key, expected in zip(batch.keys, batch.expected, strict=True)
    ]


def _start(reply: list[int], end: Sequence[int], count: int) -> list[int]:
    """The first tokens of a reply; at least one is left to the model, as in the attack."""
    ids = torch.tensor([reply])
    left = without_end_of_turn(ids, torch.ones_like(ids, dtype=torch.bool), end)
    return reply[: min(count, int(left.sum()) - 1)]


def _randoms(batch: EvaluationBatch, rng: torch.Generator) -> list[random.Random]:
    """A random state per prompt, which does not depend on its batch-mates."""
    base = draw_seed(rng)
    return [random.Random(base ^ example_id(key)) for key in batch.keys]
