"""Rows of the packaged model's corpus: every row is a pure function of what the source was asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal

from datamodules.rows import ChatRow, HarmfulRow
from datamodules.sources.tinychat import noise as noises
from datamodules.sources.tinychat.noise import Noise
from datamodules.sources.tinychat.requests import helpful_reply, refusal
from datamodules.sources.tinychat.splits import Novelty, Split, novelty
from datamodules.sources.tinychat.tasks import MAKERS, WEIGHTS, acts, in_split
from datamodules.sources.tinychat.wordings import SYSTEMS, WORDINGS

Wordings = Literal["seen", "heldout", "all"]
SYSTEM_SHARE = 1 / 3
"""Share of the rows with a system message."""


def wordings_of(split: Split, wordings: Wordings) -> tuple[str, ...]:
    """The wordings of how-to requests that a source may use.

    Raises: ValueError where training asks for held-out ones.
    """
    if split == "train" and wordings == "heldout":
        raise ValueError(
            "expected wordings seen or all for split train, got heldout; training has none of its own"
        )
    own = () if split == "train" else WORDINGS[split]
    return {"seen": WORDINGS["train"], "heldout": own, "all": WORDINGS["train"] + own}[wordings]


def harmful_rows(
    split: Split,
    wordings: Wordings = "seen",
    noise: Noise = "none",
    noise_share: float = 1.0,
    new: Novelty | None = None,
    num_rows: int | None = None,
    seed: int = 0,
) -> Iterator[HarmfulRow]:
    """Harmful requests in an order of their own: every act of the split once, then again in other
    wordings."""
    ways = wordings_of(split, wordings)
    rng = random.Random(f"harmful/{split}/{wordings}/{noise}/{seed}")
    known = [act for act in acts("request/harmful", split) if new is None or novelty(act) == new]
    count, seen = num_rows or len(known), set[str]()
    while len(seen) < count:
        before = len(seen)
        for act in rng.sample(known, len(known)):
            prompt = _noisy(rng, noise, noise_share, rng.choice(ways).format(act=act.text))
            if prompt in seen or len(seen) == count:
                continue
            seen.add(prompt)
            yield HarmfulRow(
                key=f"tinychat/harmful/{prompt}",
                prompt=prompt,
                target=helpful_reply(act),
                safe_reply=refusal(act),
                where=f"tinychat:{act.text}",
                category=act.verb_class,
                system=_system(rng, split),
            )
        if len(seen) == before:
            raise ValueError(
                f"expected at most {before} different requests of split {split}, got num_rows {count}"
            )


def benign_rows(
    split: Split,
    num_rows: int,
    seed: int = 0,
    categories: Sequence[str] | None = None,
    wordings: Wordings = "seen",
    noise: Noise = "none",
    noise_share: float = 1.0,
) -> Iterator[ChatRow]:
    """Harmless tasks, categories by weight, no prompt twice; small talk, which is not divided, in training
    only unless it is asked for."""
    names = tuple(categories or (name for name in MAKERS if split == "train" or name != "talk"))
    weights = [WEIGHTS[name] for name in names]
    rng = random.Random(f"benign/{split}/{wordings}/{noise}/{','.join(names)}/{seed}")
    ways, seen = wordings_of(split, wordings), set[str]()
    for _ in range(60 * num_rows + 1000):
        if len(seen) == num_rows:
            return
        category = rng.choices(names, weights)[0]
        task = MAKERS[category](rng, split)
        if not in_split(category, task, split):
            continue
        clean = rng.choice(ways).format(act=task.content) if category == "guide" else task.prompt
        prompt = _noisy(rng, noise, noise_share, clean)
        if prompt not in seen:
            seen.add(prompt)
            yield ChatRow(
                key=f"tinychat/{category}/{prompt}",
                prompt=prompt,
                reply=task.reply,
                where=f"tinychat:{category}",
                category=category,
                system=_system(rng, split),
            )
    raise ValueError(
        f"expected num_rows within what split {split} can make, got {num_rows}; {len(seen)} were found"
    )


def _noisy(rng: random.Random, noise: Noise, share: float, text: str) -> str:
    return noises.apply(noise, text, rng) if noise != "none" and rng.random() < share else text


def _system(rng: random.Random, split: Split) -> str | None:
    """A system message in a third of the rows."""
    return rng.choice(SYSTEMS[split]) if rng.random() < SYSTEM_SHARE else None


def corpus_texts(num_rows: int = 12000) -> Iterator[str]:
    """Plain texts of the training split, for training the tokenizer."""
    for row in harmful_rows("train", noise="mixed", noise_share=0.15, num_rows=num_rows // 4):
        yield from (row.prompt, row.target, row.safe_reply)
    for chat in benign_rows("train", num_rows, noise="mixed", noise_share=0.15):
        yield from (chat.prompt, chat.reply)
