"""A model with its adapters merged into its weights, as a copy: the model in memory is not touched."""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from lightning_modules.models.decoder import causal_lm, text_config, weight_dtype


def merged_copy(model: nn.Module) -> PreTrainedModel:
    """A copy on the CPU that needs no PEFT; of a model without adapters a plain one.

    Base weights and adapters are added in fp32 (or wider) and rounded once to the base's dtype. Below fp32
    that loses what of the adapters' change is smaller than half a step of the weight's rounding; the adapters
    by themselves do not.

    Raises: ValueError for a quantised base, whose weights cannot take the sum, and for adapters on embeddings
        that are also the head.
    """
    if getattr(causal_lm(model), "is_quantized", False):
        raise ValueError(
            "merged: expected a base in float32, bfloat16 or float16, got a quantised one; export the "
            "adapters and merge them into the unquantised base"
        )
    own = causal_lm(model)
    ends = (own.get_input_embeddings(), own.get_output_embeddings())
    if text_config(model).tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ValueError(
            "merged: expected adapters beside the embeddings, got some on embeddings that the model ties to "
            "its head, where both would change; export the adapters alone"
        )
    dtypes = {name.replace(".base_layer", ""): tensor.dtype for name, tensor in own.state_dict().items()}
    # deepcopy takes these for copies that it has made already: nothing is copied on the model's own device.
    tensors = [*model.parameters(), *model.buffers()]
    known = {id(tensor): _wide(tensor) for tensor in tensors}
    twin = copy.deepcopy(model, known)
    if isinstance(twin, PeftModel):
        twin = twin.merge_and_unload(safe_merge=True)
    merged = causal_lm(twin)
    for name, tensor in merged.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(dtypes.get(name, weight_dtype(model)))
    merged.config.dtype = weight_dtype(model)
    return merged.eval()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, floats in fp32 or wider, of the same kind."""
    own = tensor.detach().to("cpu", copy=True)
    if own.dtype in (torch.bfloat16, torch.float16):
        own = own.float()
    return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
