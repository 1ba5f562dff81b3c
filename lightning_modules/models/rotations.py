"""Rotary embeddings whose angles depend on the longest position that a pass sees.

Keys of a row's beginning, computed alone, are then turned otherwise than those of the whole row.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def same_angles(config: PreTrainedConfig, beginning: int, whole: int) -> bool:
    """Whether so many first tokens of a row are turned as the whole of so many is.

    LongRoPE (Phi-3's long contexts) has other angles beyond the length that a model was first trained on;
    dynamic NTK has others for every length beyond it.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    # One for each kind of layer, where they differ.
    for own in (rope, *rope.values()):
        kind = str(own.get("rope_type")) if isinstance(own, dict) else ""
        if "dynamic" in kind and whole > config.max_position_embeddings:
            return False
        if kind == "longrope" and beginning <= own["original_max_position_embeddings"] < whole:
            return False
    return True
