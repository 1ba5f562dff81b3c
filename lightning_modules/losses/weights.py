"""Terms on the weights themselves: spread of the embedding's singular values (ER-CAT), distance from the
starting point (L2-SP)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from datamodules.fields import Positive, checked
from lightning_modules.losses.base import LossTerms, Step
from lightning_modules.models.decoder import causal_lm
from lightning_modules.models.embeddings import embedding_matrix


def singular_values(matrix: Float[Tensor, "vocabulary dim"]) -> Float[Tensor, " dim"]:
    """In fp32 or wider, from the small Gram matrix (dim x dim): no decomposition of the matrix itself."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    eigenvalues: Tensor = torch.linalg.eigvalsh(wide.T @ wide)
    # Rounding may push a zero below 0, where the root has no gradient.
    return eigenvalues.clamp_min(torch.finfo(wide.dtype).tiny).sqrt()


@checked
class SpectralSpread:
    """ER-CAT's regulariser: the standard deviation of the singular values of W_E with its adapter's delta.

    Only a learning embedding feels it: train all weights, or name it in base.lora.target_modules.

    Args:
        weight: alpha_embed [0.5 in ER-CAT].
    """

    def __init__(self, weight: Positive = 0.5) -> None:
        self.weight = weight

    def __call__(self, step: Step) -> LossTerms:
        """Raises: ValueError where the embedding does not learn."""
        matrix = embedding_matrix(step.model)
        if torch.is_grad_enabled() and not matrix.requires_grad:
            raise ValueError(
                "SpectralSpread: expected an input embedding that learns, got a frozen one; add its "
                "name (e.g. embed_tokens) to "
                "base.lora.target_modules, or set base.lora: null"
            )
        # These are all the singular values, not a sample of them: no correction.
        spread = singular_values(matrix).std(correction=0)
        return LossTerms(self.weight * spread, {"loss_spectral_spread": spread.detach()})


@checked
class WeightDrift:
    """Squared distance of the weights from where training began (L2-SP; Li et al. 2018): of the products B A
    where adapters learn.

    Args:
        weight: weight of the term.
        which: all learning weights, or the input embedding's alone.
    """

    def __init__(self, weight: Positive = 1e-3, which: Literal["all", "embeddings"] = "all") -> None:
        self.weight = weight
        self.which = which

    def __call__(self, step: Step) -> LossTerms:
        """Raises: ValueError where nothing of what is named learns, or where it lies in pieces."""
        network = causal_lm(step.model.module)
        part: nn.Module = network.get_input_embeddings() if self.which == "embeddings" else network
        adapters = [layer for layer in part.modules() if isinstance(layer, LoraLayer)]
        if any(isinstance(p, DTensor) for p in part.parameters()):
            raise ValueError(
                "WeightDrift.which: expected weights that are whole in the outer pass, got layers that FSDP2 "
                "has divided; set which: embeddings, or trainer.strategy: ddp"
            )
        if adapters:
            # A fresh adapter's B is 0, so its product is how far the weights have moved.
            squares = [_product_norm(layer, name) for layer in adapters for name in layer.active_adapters]
        else:
            with step.reference.active() as reference:
                start = dict(causal_lm(reference.module).named_parameters())
            own = {id(p) for p in part.parameters()}
            learning = [
                (name, p) for name, p in network.named_parameters() if p.requires_grad and id(p) in own
            ]
            squares = [(p - start[name]).square().sum() for name, p in learning]
        if not squares:
            raise ValueError(
                f"WeightDrift.which: expected {self.which} weights that learn, got none; see "
                "base.lora.target_modules"
            )
        drift = torch.stack(squares).sum()
        return LossTerms(self.weight * drift, {"loss_weight_drift": drift.detach()})


def _product_norm(layer: LoraLayer, name: str) -> Float[Tensor, ""]:
    """|| s B A ||_F^2 = s^2 < B^T B, A A^T >, without the product."""
    if name in layer.lora_A:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    else:
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    norm: Tensor = layer.scaling[name] ** 2 * ((b.T @ b) * (a @ a.T)).sum()
    return norm
