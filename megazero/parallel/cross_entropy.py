"""Output projection and cross-entropy in one, over a vocabulary split over tp, never holding the full logits.

Tokens go through in chunks: logits of a chunk, three numbers per token gathered over tp, the loss, and at once the
chunk's gradients by hidden state and weight (the loss is a sum, so backward only scales them: no recomputation, and
running backward in two halves repeats no collective). Padding rows of the weight are not multiplied at all. Memory:
one chunk of logits, plus an fp32 gradient of the weight between forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megazero.ops.cross_entropy import exponentiate_, softmax_gradient_
from megazero.parallel.collectives import all_gather
from megazero.parallel.topology import AxisGroup

# Logits in one chunk: small enough for a CPU's cache, large enough to fill a GPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    vocab_size: int,
    first_row: int,
    group: AxisGroup,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum over tokens of loss_mask · cross-entropy of hidden @ weightᵀ.

    Args:
        hidden: [T, h], equal on all tp ranks; its gradient is a part that is still to be summed over tp.
        weight: this rank's rows of the (padded) output matrix, [v, h].
        labels: int64 [T], each < vocab_size. loss_mask: [T].
        vocab_size: rows beyond it are padding and not part of the softmax.
        first_row: logical number of the first row held here.
        chunk_tokens: tokens in a chunk; by default chosen for the device.

    Returns: fp32 scalar, equal on all tp ranks.
    """
    real = min(max(vocab_size - first_row, 0), weight.shape[0])
    chunk = chunk_tokens or max(_CHUNK_ELEMENTS.get(hidden.device.type, 1 << 27) // max(weight.shape[0], 1), 16)
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, labels, loss_mask.float(), first_row, real, group, chunk, torch.is_grad_enabled()
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        first_row: int,
        real: int,
        group: AxisGroup,
        chunk: int,
        wanted: bool,
    ) -> Tensor:
        rows = weight[:real]
        columns = labels - first_row
        here = (columns >= 0) & (columns < real)
        columns = columns.masked_fill(~here, 0)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted else None
        for part in _chunks(hidden.shape[0], chunk):
            logits = (hidden[part] @ rows.t()).float()  # [c, real]
            own = exponentiate_(logits, columns[part], here[part])  # [3, c]
            parts = all_gather(own.unsqueeze(0), group, dim=0)  # [tp, 3, c]
            maximum = parts[:, 0].amax(dim=0)
            total = (parts[:, 1] * (parts[:, 0] - maximum).exp()).sum(dim=0)
            log_sum = maximum + total.log()
            loss += ((log_sum - parts[:, 2].sum(dim=0)) * loss_mask[part]).sum()
            if grad_hidden is not None and grad_weight is not None:
                scale = loss_mask[part] * (own[0] - log_sum).exp()
                gradient = softmax_gradient_(logits, scale, columns[part], here[part], loss_mask[part]).to(hidden.dtype)
                torch.mm(gradient, rows, out=grad_hidden[part])
                if weight.dtype == torch.float32:
                    grad_weight[:real].addmm_(gradient.t(), hidden[part])
                else:  # sum chunks in fp32
                    grad_weight[:real] += gradient.t() @ hidden[part]
        if wanted:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled_weight = (grad_weight * grad).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        scaled_hidden = (grad_hidden * grad).to(grad_hidden.dtype) if ctx.needs_input_grad[0] else None
        return scaled_hidden, scaled_weight, None, None, None, None, None, None, None


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
