"""What a batch must keep, checked where it is made."""

from __future__ import annotations

import pytest
import torch

from datamodules.batch import AdversarialBatch, TrainingBatch
from datamodules.rows import example_id
from tests.conftest import ragged_batch


def broken(**changes: torch.Tensor) -> AdversarialBatch:
    batch = ragged_batch()
    return AdversarialBatch(**({name: getattr(batch, name) for name in batch.__dataclass_fields__} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt_mask": ragged_batch().prompt_mask.long()},
            "expected prompt_mask of dtype bool, got torch.int64",
        ),
        ({"prompt_mask": ragged_batch().prompt_mask.flip(1)}, "expected prompt_mask left-padded"),
        (
            {"harmful_mask": torch.zeros_like(ragged_batch().harmful_mask)},
            "expected harmful_mask right-padded with at least one token",
        ),
        (
            {"attackable_mask": torch.ones_like(ragged_batch().prompt_mask)},
            "expected attackable_mask within prompt_mask",
        ),
        (
            {"attackable_mask": torch.zeros_like(ragged_batch().prompt_mask)},
            "at least one attackable token per row",
        ),
        ({"safe_ids": torch.zeros(3, 1, dtype=torch.long)}, "expected safe_ids and safe_mask of one shape"),
    ],
)
def test_batch_invariants(changes: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        broken(**changes).validate()


def test_batches_move_as_a_whole() -> None:
    moved = TrainingBatch(ragged_batch(), None).to("meta")
    assert moved.adversarial is not None
    assert moved.adversarial.prompt_ids.device.type == "meta"


def test_example_ids_are_stable() -> None:
    assert example_id("adv_training_1/0") == 3428698758614272111
    assert 0 <= example_id("x") < 2**63
