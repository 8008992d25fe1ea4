"""RMSNorm and LayerNorm over the last dim, statistics in fp32.

    RMSNorm(x) = x / sqrt(mean(x²) + eps) · w          (Zhang & Sennrich, arXiv 1910.07467)
    LayerNorm(x) = (x - mean(x)) / sqrt(var(x) + eps) · w + b

torch's own rms_norm is one kernel on CUDA and a chain of slow elementwise ones on CPU, so the CPU has a Function on
LayerNorm's fused backward, which keeps only x and the row statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula, in fp32. x [..., n], weight [n] -> [..., n] in x's type."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., n] with weight [n]; returns x's type."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x [..., n] with weight [n] and bias [n]; returns x's type."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        # 1 / sqrt(mean(x²) + eps) without a temporary for x²
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1]
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # With mean 0 and rstd = scale, LayerNorm's fused backward gives RMSNorm's weight gradient, and its input
        # gradient less scale · mean(grad · w): n = x · scale, dx = scale · (grad·w - n · mean(grad·w · n)).
        x, weight, scale = ctx.saved_tensors
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        x_rows, grad_rows = x.reshape(rows, width), grad.reshape(rows, width)  # [rows, n]
        scale = scale.view(rows, 1)
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad_rows, x_rows, [width], torch.zeros_like(scale), scale, weight.float(), None, [True, True, False]
        )
        missing = (grad_rows @ weight).float().div_(width).unsqueeze_(-1).mul_(scale)  # [rows, 1]
        return grad_x.add_(missing).view_as(x), grad_weight.to(weight.dtype), None
