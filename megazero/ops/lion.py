"""Lion (Chen et al., arXiv 2302.06675, Program 1): the sign of an interpolated momentum, one state per element.

c = β₁m + (1-β₁)g;   w ← w·(1 - lr·λ) - lr·sign(c);   m ← β₂m + (1-β₂)g
"""

from __future__ import annotations

import torch
from torch import Tensor


def lion_update(
    weight: Tensor, gradient: Tensor, momentum: Tensor, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    """One step, in place on weight and momentum; all of one shape."""
    direction = momentum.lerp(gradient, 1 - betas[0]).sign_()
    if weight_decay:
        weight.mul_(1 - lr * weight_decay)
    weight.add_(direction, alpha=-lr)
    momentum.lerp_(gradient, 1 - betas[1])


def lion_reference(
    weight: Tensor, gradient: Tensor, momentum: Tensor, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> tuple[Tensor, Tensor]:
    """New weight and momentum as the formula reads."""
    direction = torch.sign(betas[0] * momentum + (1 - betas[0]) * gradient)
    return (
        weight - lr * (direction + weight_decay * weight),
        betas[1] * momentum + (1 - betas[1]) * gradient,
    )
