"""A short digest of a model's weights: the key under which results and caches of that model are kept."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


@torch.no_grad()
def fingerprint(model: nn.Module, leave_out: str | None = None) -> str:
    """Digest of names, shapes and two float64 sums per tensor.

    Args:
        model: any module.
        leave_out: skip weights whose name contains this, e.g. `lora_` for the base model under adapters.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.state_dict().items():
        if leave_out is not None and leave_out in name:
            continue
        wide = weight.double() if weight.is_floating_point() else weight.to(torch.float64)
        digest.update(
            f"{name} {tuple(weight.shape)} {wide.sum().item()!r} {wide.square().sum().item()!r};".encode()
        )
    return digest.hexdigest()
