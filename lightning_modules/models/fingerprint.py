"""A short digest of a model's weights: the key under which results and caches of that model are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(model: nn.Module, leave_out: str | None = None) -> str:
    """Digest of names, shapes and two checksums per tensor.

    The checksums are whole numbers modulo 2^64, so that they are the same for any number of threads and on
    any device; sums of floats are not.

    Args:
        model: any module.
        leave_out: skip weights whose name contains this, e.g. `lora_` for the base model under adapters.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in _weights(model):
        if leave_out is None or leave_out not in name:
            digest.update(f"{name} {tuple(weight.shape)} {checksums(weight)};".encode())
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As `state_dict` names and orders them, which would take gathered weights to pieces again."""
    if not any(isinstance(part, FSDPModule) for part in model.modules()):
        yield from model.state_dict().items()
        return
    for place, part in model.named_modules(remove_duplicate=False):
        kept = [*part._parameters.items(), *((n, b) for n, b in part._buffers.items()
                                             if n not in part._non_persistent_buffers_set)]  # fmt: skip
        for name, weight in kept:
            if weight is not None:
                yield f"{place}.{name}" if place else name, weight


def checksums(weight: Tensor, width: int = 1024) -> tuple[int, int]:
    """The tensor's bit patterns laid out in rows: the sums of the columns, and of the rows, times their odd
    numbers, modulo 2^64."""
    bits = weight.detach().contiguous().view(-1).view(BITS[weight.element_size()])
    if len(bits) % width:
        bits = nn.functional.pad(bits, (0, -len(bits) % width))
    bits = bits.view(-1, width)
    return _weighted(bits.sum(0, dtype=torch.int64)), _weighted(bits.sum(1, dtype=torch.int64))


def _weighted(sums: Tensor) -> int:
    places = 2 * torch.arange(len(sums), device=sums.device) + 1
    return int((sums * places).sum()) % 2**64
