"""LAMB (You et al., arXiv 1904.00962, Algorithm 2): Adam's direction, rescaled for each parameter tensor by its norm.

    m ← β₁m + (1-β₁)g;   v ← β₂v + (1-β₂)g²;   r = m/(1-β₁ᵗ) / (√(v/(1-β₂ᵗ)) + ε);   u = r + λw
    w ← w - lr · clamp(‖w‖ / ‖u‖, min_coeff, max_coeff) · u

The two norms are of the whole parameter; all else is by element. A ratio of which one norm is 0 is 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lamb_moments(gradient: Tensor, first: Tensor, second: Tensor, betas: tuple[float, float]) -> None:
    """Take the gradient into both moments, in place."""
    first.lerp_(gradient, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])


def lamb_direction(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool = True,
    eps_inside_sqrt: bool = False,
) -> Tensor:
    """u of the formula, by element; `step` counts from 1."""
    corrections = [1 - beta**step if bias_correction else 1.0 for beta in betas]
    if eps_inside_sqrt:
        root = (second / corrections[1]).add_(eps).sqrt_()
    else:
        root = second.sqrt().div_(math.sqrt(corrections[1])).add_(eps)
    direction = torch.div(first, root, out=root)
    direction.div_(corrections[0])
    if weight_decay:
        direction.add_(weight, alpha=weight_decay)
    return direction


def trust_ratio(weight_norm: float, direction_norm: float, min_coeff: float, max_coeff: float) -> float:
    """By how much the direction is rescaled."""
    if weight_norm == 0 or direction_norm == 0:
        return 1.0
    return min(max(weight_norm / direction_norm, min_coeff), max_coeff)


def lamb_reference(
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
    min_coeff: float,
    max_coeff: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New weight and moments of one whole parameter, as the formula reads."""
    m = betas[0] * first + (1 - betas[0]) * gradient
    v = betas[1] * second + (1 - betas[1]) * gradient**2
    u = m / (1 - betas[0] ** step) / (torch.sqrt(v / (1 - betas[1] ** step)) + eps) + weight_decay * weight
    ratio = torch.clamp(weight.norm() / u.norm(), min_coeff, max_coeff)
    return weight - lr * ratio * u, m, v
