"""Models with adapters."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def lora(model: nn.Module, **changes: object) -> nn.Module:
    """The model with adapters of rank 4 that are not zero; `changes` are fields of LoraConfig."""
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    wrapped = get_peft_model(model, LoraConfig(**fields))  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(3)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.1
    return wrapped
