"""Muon's step (Jordan et al., https://kellerjordan.github.io/posts/muon/): momentum, orthogonalised by Newton-Schulz.

    B ← μB + (1-μ)g;   M = (1-μ)g + μB (Nesterov) or B;   X₀ = M / ‖M‖;   X ← aX + (bA + cA²)X with A = XXᵀ, five times
    w ← w·(1 - lr·λ) - lr·scale(shape)·X

Newton-Schulz works on the whole matrix and runs in bf16, operation by operation as torch.optim.Muon does, so that both
give the same bits. It drives all singular values near to 1: to between about 0.7 and 1.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the iteration."""
ADJUSTMENTS = ("original", "match_rms_adamw")


def muon_direction(gradient: Tensor, momentum: Tensor, beta: float, nesterov: bool) -> Tensor:
    """Take the gradient into the momentum, in place, and return what is to be orthogonalised; by element."""
    momentum.lerp_(gradient, 1 - beta)
    return gradient.lerp(momentum, beta) if nesterov else momentum


def orthogonalize(
    direction: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """[rows, cols] -> about UVᵀ of its singular value decomposition, bf16, same shape."""
    a, b, c = coefficients
    tall = direction.size(0) > direction.size(1)
    x = direction.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def matrices_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(number, rows, columns) of the matrices that a parameter of this shape is orthogonalised as.

    Two dims are one matrix, three a stack of matrices (experts, say), more a convolution's filters [out, in · kernel].
    """
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def learning_rate_scale(rows: int, columns: int, adjustment: str | None) -> float:
    """Factor on the learning rate: Jordan's (`original`), or Moonshot's, which gives AdamW's usual update size."""
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def orthogonalize_reference(direction: Tensor) -> Tensor:
    """UVᵀ exactly, by singular value decomposition in fp64: what `orthogonalize` is near to."""
    left, _, right = torch.linalg.svd(direction.double(), full_matrices=False)
    exact: Tensor = left @ right
    return exact
