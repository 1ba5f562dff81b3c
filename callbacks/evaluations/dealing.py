"""Which process measures which rows."""

from __future__ import annotations

from collections import Counter

from datamodules.batch import EvaluationBatch
from datamodules.evaluation import EvaluationData, Subject


def dealt_out(
    data: EvaluationData,
    subject: Subject,
    limit: int | None,
    world_size: int,
    block: str = "",
    against: str = "",
) -> list[list[EvaluationBatch]]:
    """The batches of a subject by process. Raises: ValueError for a key that several rows have."""
    shares = [
        list(data.loader(subject, limit, rank, world_size, block, against)) for rank in range(world_size)
    ]
    keys = Counter(key for share in shares for batch in share for key in batch.keys)
    repeated = next((key for key, count in keys.items() if count > 1), None)
    if repeated is not None:
        # Their rows would collapse into one, and n would silently be smaller.
        raise ValueError(f"data.evaluation.{subject}: several rows have the key {repeated!r}; rename them")
    return shares
