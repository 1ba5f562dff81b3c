"""Log-probabilities of given tokens from hidden states, without keeping (tokens, vocabulary) tensors for the
backward pass.

With a vocabulary of 32,000 to 256,000 the logits dominate the memory of an attack step. The rows are taken in
chunks, and while a chunk's logits are alive both its log-probabilities and their gradient with respect to the
hidden state are computed: d log p_t / d h = s * (W_t - sum_v p_v W_v). Two matrix products per token, as
    autograd would need, and one chunk of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 23
"""Logits alive at once: 32 MiB in fp32."""


@dataclass(frozen=True)
class LogitTransform:
    """What some architectures do to the logits: multiply by a scale, then cap softly: c * tanh(logits /
    c)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def token_log_probs(
    hidden: Float[Tensor, "row dim"],
    weight: Float[Tensor, "vocabulary dim"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " row"],
    transform: LogitTransform | None = None,
) -> Float[Tensor, " row"]:
    """log p(targets) under softmax(transform(hidden @ weight.T + bias)), in fp32 or wider.

    Args:
        hidden: states that predict the targets.
        weight: the output embedding.
        bias: its bias, where it has one.
        targets: token ids.
        transform: the architecture's logit transform.

    Returns: log-probabilities, differentiable once in `hidden`, and in `weight` and `bias` where they require
        gradients.
    """
    transform = transform or LogitTransform()
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    head_learns = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if head_learns:
        # The head's own gradient needs the upstream gradient per token, so these chunks are recomputed in the
        # backward pass.
        parts = [
            checkpoint(_reference_log_probs, h, weight, bias, t, transform, use_reentrant=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0).float()
    given = hidden, weight, bias, targets, transform, rows
    result: Tensor = _TokenLogProbs.apply(*given)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def token_scores(
    hidden: Float[Tensor, "row dim"],
    weight: Float[Tensor, "vocabulary dim"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " row"],
    transform: LogitTransform | None = None,
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """As `token_log_probs` without a gradient, and whether greedy decoding would say the target.

    The maximum is at hand anyway: knowing what is said costs a comparison.
    """
    transform = transform or LogitTransform()
    log_probs, said = [], []
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = transform(_widen(torch.nn.functional.linear(h, weight, bias)))
        own, top = logits.gather(1, t[:, None]), logits.amax(1, keepdim=True)
        said.append((own == top).squeeze(1))
        log_probs.append((own - top - logits.sub_(top).exp_().sum(1, keepdim=True).log()).squeeze(1))
    if not said:
        return hidden.new_zeros(0).float(), targets.bool()
    return torch.cat(log_probs), torch.cat(said)


def _reference_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
) -> Tensor:
    logits = transform(_widen(torch.nn.functional.linear(hidden, weight, bias)))
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _TokenLogProbs(torch.autograd.Function):
    """Chunked log-softmax whose gradient in `hidden` is formed during the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        rows: int,
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        log_probs = torch.empty(
            len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
        )
        gradient = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            target = targets[chunk, None]
            logits = transform(_widen(torch.nn.functional.linear(hidden[chunk], weight, bias)))
            own = logits.gather(1, target)
            top = logits.amax(1, keepdim=True)
            # The cap's derivative needs the capped logits, which the next lines overwrite in place.
            slope = 1.0 - (logits / transform.softcap) ** 2 if needs_gradient and transform.softcap else None
            exponentials = logits.sub_(top).exp_()
            total = exponentials.sum(1, keepdim=True)
            log_probs[chunk] = (own - top - total.log()).squeeze(1)
            if gradient is not None:
                residual = exponentials.div_(total).neg_()
                residual.scatter_add_(1, target, torch.ones_like(own))
                if slope is not None:
                    residual *= slope
                product = residual.to(weight.dtype) @ weight
                gradient[chunk] = product if transform.scale == 1.0 else product * transform.scale
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return log_probs

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None, None, None
