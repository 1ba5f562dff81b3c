"""A model beside the one that its training began from."""

from __future__ import annotations

import torch

from lightning_modules.models.frozen import Reference
from lightning_modules.models.language_model import LanguageModel
from lightning_modules.models.loading import LoraSettings, ModelConfig, load_seeded
from tests.conftest import tinychat_format


def loaded(lora: bool, moved: float = 0.0) -> tuple[LanguageModel, Reference]:
    """The packaged model, its adapters or its layers moved at random, and the model before that."""
    base = ModelConfig("tinychat:aligned", lora=LoraSettings(r=2) if lora else None)
    model = LanguageModel(load_seeded(base, 0), tinychat_format())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            if weight.requires_grad and ("lora_B" in name or "mlp" in name):
                weight += moved * torch.randn(weight.shape, generator=generator)
    return model, Reference(model, base, 0)
