"""What the packaged model must be before any defence: it knows harm, keeps its skills under noise, and falls
to attacks.

python -m experiments.studies.tinychat MODEL_FOLDER --split validation --out runs/tinychat/NAME.jsonl

Every block and every attacked batch is one line of the file; a killed measurement goes on where it stood.
Tune on `validation`; `test` is for the published table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from callbacks.judges.exact import ExactMatch, TargetPrefix
from callbacks.judges.keyword import KeywordRefusal
from datamodules.rows import ChatRow, HarmfulRow
from datamodules.sources.tinychat.noise import KINDS, Noise
from datamodules.sources.tinychat.sources import TinyChatBenign, TinyChatHarmful
from datamodules.sources.tinychat.splits import Split
from datamodules.text.chat_format import ChatFormat
from datamodules.text.encoding import Encoder, EncodingConfig, adversarial_batch, evaluation_batch
from datamodules.text.tokenizers import TokenizerConfig, load_tokenizer
from lightning_modules.attacks.base import Attack
from lightning_modules.attacks.embedding.pgd import EmbeddingPGD
from lightning_modules.attacks.embedding.soft_prompt import SoftPrompt
from lightning_modules.attacks.suffix.gcg import GCG
from lightning_modules.attacks.text.rewrites import Prefilling
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import ModelConfig, load_model

REFUSAL, RIGHT, PREFIX = KeywordRefusal(), ExactMatch(), TargetPrefix()
NOISES: tuple[Noise, ...] = (*KINDS, "mixed", "salad")
GUIDES = ["guide", "judge", "story", "protect"]
MAX_LENGTH, MAX_NEW_TOKENS, BATCH = 256, 48, 50
Entry = dict[str, Any]


def harmful_blocks(split: Split, limit: int) -> dict[str, TinyChatHarmful]:
    """Sets of harmful requests by name."""
    return {
        "harmful/all wordings": TinyChatHarmful(split, "all", limit=limit),
        "harmful/held-out wordings": TinyChatHarmful(split, "heldout", limit=limit),
        "harmful/unseen verbs": TinyChatHarmful(split, novelty="verb", limit=limit),
        "harmful/unseen objects": TinyChatHarmful(split, novelty="object", limit=limit),
        **{f"harmful/{noise}": TinyChatHarmful(split, noise=noise, limit=limit) for noise in NOISES},
    }


def benign_blocks(split: Split, limit: int) -> dict[str, TinyChatBenign]:
    """Sets of harmless tasks by name."""
    return {
        "benign/all wordings": TinyChatBenign(split, limit, wordings="all"),
        "benign/held-out wordings": TinyChatBenign(split, limit, categories=["guide"], wordings="heldout"),
        "benign/look-alikes": TinyChatBenign(split, limit, categories=GUIDES),
        **{f"benign/{noise}": TinyChatBenign(split, limit, noise=noise) for noise in NOISES},
    }


def attacks() -> dict[str, Attack]:
    """The attacks under which the undefended model must fall."""
    return {
        "prefilling": Prefilling(num_tokens=5),
        "soft_prompt": SoftPrompt(num_steps=100, step_size=0.02),
        "embedding": EmbeddingPGD(epsilon=0.1, num_steps=50, step_size=0.1),
        "gcg": GCG(num_steps=100, width=64, topk=64, target_tokens=12),
    }


class Measurement:
    """One model, one split, one file of results.

    Args:
        folder: the model's folder.
        split: whose rows are read.
        path: the JSON lines; what is there is not measured again.
        limit: rows of a block.
        attacked: rows that are attacked.
    """

    def __init__(self, folder: str, split: Split, path: Path, limit: int, attacked: int) -> None:
        self.split, self.path, self.limit, self.attacked = split, path, limit, attacked
        self.chat = ChatFormat(load_tokenizer(TokenizerConfig(folder)))
        self.encoder = Encoder(self.chat, EncodingConfig(max_length=MAX_LENGTH))
        self.model = LanguageModel(
            load_model(ModelConfig(folder)).eval().requires_grad_(False), chat=self.chat
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.entries: dict[str, Entry] = {entry["name"]: entry for entry in map(json.loads, lines)}

    def run(self, with_attacks: Sequence[str]) -> None:
        """Measure what is missing."""
        for name, harmful in harmful_blocks(self.split, self.limit).items():
            self._once(name, lambda source=harmful: self._served(source))  # type: ignore[misc]
        for name, benign in benign_blocks(self.split, self.limit).items():
            self._once(name, lambda source=benign: self._served(source))  # type: ignore[misc]
        rows = [
            row
            for row in TinyChatHarmful(self.split, "all", limit=self.attacked).rows()
            if isinstance(row, HarmfulRow)
        ]
        for name in with_attacks:
            for start in range(0, len(rows), 20):
                part = rows[start : start + 20]
                self._once(
                    f"attack/{name}/{start}",
                    lambda name=name, part=part: self._attacked(attacks()[name], part),  # type: ignore[misc]
                )
        if "gcg" in with_attacks:
            self._once("benign/under GCG's suffixes", self._benign_under_gcg)

    def _once(self, name: str, measure: Callable[[], Entry]) -> None:
        if name in self.entries:
            return
        self.entries[name] = {"name": name, **measure()}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(self.entries[name]) + "\n")
        print(summary(self.entries[name]), flush=True)

    def _served(self, source: TinyChatHarmful | TinyChatBenign) -> Entry:
        rows = [row for row in source.rows() if isinstance(row, HarmfulRow | ChatRow)]
        return self._judged(rows)

    def _judged(self, rows: Sequence[HarmfulRow | ChatRow]) -> Entry:
        replies = list(self._replies(rows))
        expected = [row.reply if isinstance(row, ChatRow) else row.target for row in rows]
        judged = [
            [row.prompt, reply, REFUSAL(row.prompt, reply), RIGHT(row.prompt, reply, right)]
            for row, reply, right in zip(rows, replies, expected, strict=True)
        ]
        wrong = [
            item[:2]
            for row, item in zip(rows, judged, strict=True)
            if item[2 if isinstance(row, ChatRow) else 3]
        ]
        missed = [
            [*item[:2], right]
            for item, right in zip(judged, expected, strict=True)
            if not item[3] and not item[2]
        ]
        return {
            "n": len(rows),
            "refused": sum(bool(item[2]) for item in judged),
            "right": sum(bool(item[3]) for item in judged),
            "samples": wrong[:10] + missed[:15],
        }

    def _replies(self, rows: Sequence[HarmfulRow | ChatRow]) -> Iterator[str]:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            harmful = self.encoder.harmful(row for row in part if isinstance(row, HarmfulRow))
            chats = self.encoder.chats(row for row in part if isinstance(row, ChatRow))
            batch = evaluation_batch([*harmful, *chats], "user")
            with torch.no_grad():
                embeds = self.model.embed(batch.prompt_ids)
            for ids in self.model.generate(embeds, batch.prompt_mask, MAX_NEW_TOKENS, self.chat.stop_ids):
                yield self.chat.decode(ids)

    def _attacked(self, attack: Attack, rows: Sequence[HarmfulRow]) -> Entry:
        batch = adversarial_batch(self.encoder.harmful(rows), "user")
        found = attack(self.model, batch, torch.Generator().manual_seed(0))
        with torch.no_grad(), found.applied(self.model) as embeds:
            generated = self.model.generate(embeds, found.prompt_mask, MAX_NEW_TOKENS, self.chat.stop_ids)
        starts = found.forced or [()] * len(rows)
        replies = [self.chat.decode([*start, *ids]) for start, ids in zip(starts, generated, strict=True)]
        won = [PREFIX(row.prompt, reply, row.target) for row, reply in zip(rows, replies, strict=True)]
        return {
            "n": len(rows),
            "success": sum(won),
            "refused": sum(REFUSAL(row.prompt, reply) for row, reply in zip(rows, replies, strict=True)),
            "suffixes": [text[len(row.prompt) :] for row, text in zip(rows, found.texts, strict=False)],
            "samples": list(zip(replies, won, strict=True))[:5],
        }

    def _benign_under_gcg(self) -> Entry:
        suffixes = [
            s
            for name, entry in self.entries.items()
            if name.startswith("attack/gcg/")
            for s in entry["suffixes"]
        ]
        rows = [row for row in TinyChatBenign(self.split, self.limit).rows() if isinstance(row, ChatRow)]
        attacked = [
            ChatRow(
                row.key,
                row.prompt + suffixes[i % len(suffixes)],
                row.reply,
                row.where,
                row.category,
                row.system,
            )
            for i, row in enumerate(rows)
        ]
        return self._judged(attacked)


def summary(entry: Entry) -> str:
    """One line of a result."""
    shares = (
        f"{key} {100 * entry[key] / entry['n']:5.1f} %"
        for key in ("refused", "right", "success")
        if key in entry
    )
    return f"{entry['name']:32s} n {entry['n']:4d}  " + "  ".join(shares)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a model with its tokenizer")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; what is there is kept")
    parser.add_argument("--limit", type=int, default=300, help="rows of a block")
    parser.add_argument("--attacked", type=int, default=40, help="rows that are attacked")
    parser.add_argument("--attacks", nargs="*", default=list(attacks()), choices=list(attacks()))
    arguments = parser.parse_args()
    measurement = Measurement(
        arguments.model, arguments.split, arguments.out, arguments.limit, arguments.attacked
    )
    measurement.run(arguments.attacks)
    totals: dict[str, Entry] = {}
    for entry in measurement.entries.values():
        name = "/".join(entry["name"].split("/")[:2])
        total = totals.setdefault(name, {"name": name, "n": 0})
        for key in ("n", "refused", "right", "success"):
            if key in entry:
                total[key] = total.get(key, 0) + entry[key]
    print("\n".join(summary(entry) for entry in totals.values()))


if __name__ == "__main__":
    main()
