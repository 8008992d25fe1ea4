"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout of Hugging Face's models.

    with halves x = [x1, x2]:  rope(x) = [x1·cos - x2·sin, x2·cos + x1·sin],  angle = position · base^(-2i/rotary_dim)

Llama 3.1 stretches the low frequencies by `factor` and blends those in between (meta-llama's reference; 8192 is the
context of the original training).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_ORIGINAL_CONTEXT, _LOW_FREQUENCY_FACTOR, _HIGH_FREQUENCY_FACTOR = 8192, 1.0, 4.0


def rope_frequencies(rotary_dim: int, base: float, scaling_factor: float | None = None) -> Tensor:
    """Angle per position of each channel pair, fp32 [rotary_dim / 2]. `scaling_factor`: Llama 3.1's, or None."""
    frequencies = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    if scaling_factor is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # 1 for wavelengths that fit the original context often enough, 0 for those that do not fit it at all
    keep = (_ORIGINAL_CONTEXT / wavelengths - _LOW_FREQUENCY_FACTOR) / (_HIGH_FREQUENCY_FACTOR - _LOW_FREQUENCY_FACTOR)
    keep = keep.clamp(0.0, 1.0)
    return frequencies * keep + frequencies / scaling_factor * (1 - keep)


def rope_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for positions [b, s] (or [1, s]): each fp32 [b, s, 1, rotary_dim / 2]."""
    angles = positions.float().unsqueeze(-1) * frequencies  # [b, s, rotary_dim / 2]
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def apply_rope_reference(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """The formula on the first rotary_dim channels of x [b, s, heads, d]."""
    cos, sin = table
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest], dim=-1)


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first rotary_dim channels of each head. x [b, s, heads, d] -> the same shape and type."""
    if torch.compiler.is_compiling():
        return apply_rope_reference(x, table)
    return _Rope.apply(x, *table)


class _Rope(torch.autograd.Function):
    # A rotation's backward is the rotation by the opposite angle, so nothing but the table is kept.
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    out[..., :half] = (x1 * cos).addcmul_(x2, sin, value=-1)  # products in fp32, also for 16-bit x
    out[..., half : 2 * half] = (x2 * cos).addcmul_(x1, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
