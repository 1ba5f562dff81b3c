"""Reference log-probabilities of all training rows: computed once per row, kept on disk, handed out by
example id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import AdversarialBatch
from lightning_modules.attacks.base import NoAttack
from lightning_modules.losses.base import ReferenceScores
from lightning_modules.models.embeddings import embedding_weight
from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.likelihood import mean_cross_entropy
from lightning_modules.scoring import score_replies

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest margin at initialisation, in nats per token, that the dtype's rounding explains."""


class ReferenceTable:
    """lp0(y | x) and lp0(y_hat | x) by example id.

    The file is named by the reference's weights; a row in it by the digest of its token ids, so that another
    model, data set, chat template or system message never meets an old number.

    Args:
        folder: where the file is kept; runs that share a folder share the work.
        reference: the reference model.
    """

    def __init__(self, folder: str | Path, reference: Reference) -> None:
        self.path = Path(folder) / f"{reference.key}.json"
        self._reference = reference
        self._by_id: dict[int, tuple[float, float]] = {}

    def fill(self, batches: Iterable[AdversarialBatch], device: torch.device, write: bool = True) -> int:
        """Look all rows up, compute those that the file lacks, write it. Returns how many were computed.

        Raises: ValueError where two different rows have the same example id, OSError where the folder cannot
            be written.
        """
        if write:
            self._make_folder()
        known: dict[str, tuple[float, float]] = {}
        if self.path.is_file():
            known = {
                row: (safe, harmful)
                for row, (safe, harmful) in json.loads(self.path.read_text(encoding="utf-8")).items()
            }
        computed = 0
        rows_of_ids: dict[int, str] = {}
        for batch in batches:
            rows = row_digests(batch)
            missing = [i for i, row in enumerate(rows) if row not in known]
            if missing:
                scores = self._score(batch.select(missing).to(device))
                known |= {rows[i]: score for i, score in zip(missing, scores, strict=True)}
                computed += len(missing)
            for number, row in zip(batch.example_id.tolist(), rows, strict=True):
                if rows_of_ids.setdefault(number, row) != row:
                    raise ValueError(
                        "reference log-probabilities: two different rows have the example id "
                        f"{number}; give rows unique keys"
                    )
                self._by_id[number] = known[row]
        if write and computed:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(known), encoding="utf-8")
            partial.replace(self.path)
        self._reference.release()
        return computed

    def _make_folder(self) -> None:
        # Before anything is computed: an hour of reference passes must not end in a path that cannot be
        # written.
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"model.reference_cache: cannot make the folder {str(self.path.parent)!r}: {error.strerror}"
            ) from error

    def __call__(self, batch: AdversarialBatch) -> ReferenceScores:
        """The batch's scores in fp64. Raises: ValueError for an example that `fill` has not seen."""
        try:
            found = [self._by_id[number] for number in batch.example_id.tolist()]
        except KeyError as error:
            raise ValueError(
                f"no reference log-probability for example {error.args[0]}; the training rows changed "
                "since `fit` began"
            ) from error
        safe, harmful = torch.tensor(found, dtype=torch.float64, device=batch.prompt_ids.device).unbind(1)
        return ReferenceScores(safe, harmful)

    def check_start(self, model: LanguageModel, batch: AdversarialBatch) -> None:
        """Before the first step and without an attack the policy is the reference, so every margin h is 0.

        Raises: ValueError if it is not: the cache belongs to another model, or its rows were mixed up.
        """
        with torch.no_grad(), model.frozen():
            safe, harmful = _mean_log_probs(model, batch)
        stored = self(batch)
        margin = ((safe - harmful).double() - (stored.safe - stored.harmful)).abs().max().item()
        if not margin <= TOLERANCE[embedding_weight(model).dtype]:
            raise ValueError(
                f"the reference log-probabilities in {self.path} are not this model's: the margin at "
                f"initialisation is {margin:.3g}, "
                "expected 0; delete the file"
            )

    def _score(self, batch: AdversarialBatch) -> list[tuple[float, float]]:
        with self._reference.active() as model:
            safe, harmful = _mean_log_probs(model, batch)
        return list(zip(safe.tolist(), harmful.tolist(), strict=True))


def row_digests(batch: AdversarialBatch) -> list[str]:
    """A digest of each row's prompt and replies as token ids."""
    columns = (
        (batch.prompt_ids, batch.prompt_mask),
        (batch.safe_ids, batch.safe_mask),
        (batch.harmful_ids, batch.harmful_mask),
    )
    rows = ([ids[i][mask[i]].tolist() for ids, mask in columns] for i in range(len(batch)))
    return [hashlib.blake2b(json.dumps(row).encode(), digest_size=12).hexdigest() for row in rows]


def _mean_log_probs(
    model: LanguageModel, batch: AdversarialBatch
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Of the safe and of the harmful reply."""
    scores = score_replies(model, batch, NoAttack()(model, batch))
    return -mean_cross_entropy(scores.safe_log_probs, scores.safe_mask), -mean_cross_entropy(
        scores.harmful_log_probs, scores.harmful_mask
    )
