"""Newton-Schulz against the singular value decomposition and torch's, momentum, shapes, and learning-rate scales."""

from __future__ import annotations

import pytest
import torch

from megazero.ops.muon import (
    learning_rate_scale,
    matrices_of,
    muon_direction,
    orthogonalize,
    orthogonalize_reference,
)

SHAPES = [(8, 8), (6, 20), (20, 6), (1, 7), (7, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_is_near_the_decomposition(shape: tuple[int, int]) -> None:
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    before = direction.clone()
    found = orthogonalize(direction)
    assert found.dtype == torch.bfloat16 and found.shape == shape
    assert torch.equal(direction, before)
    exact = orthogonalize_reference(direction)
    left, _, right = torch.linalg.svd(direction.double(), full_matrices=False)
    values = torch.diagonal(left.T @ found.double() @ right.T)
    assert values.min() > 0.6 and values.max() < 1.3
    cosine = (found.double() * exact).sum() / (found.double().norm() * exact.norm())
    assert cosine > 0.97


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_has_the_bits_of_torch(shape: tuple[int, int]) -> None:
    """One step of torch.optim.Muon from zero weights, without momentum: its update is the orthogonalised gradient."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    scale = learning_rate_scale(*shape, None)
    assert torch.equal(weight.detach(), torch.zeros(shape).add_(orthogonalize(gradient), alpha=-scale))


def test_zero_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(3, 4)).any()


def test_direction_by_hand() -> None:
    momentum = torch.tensor([2.0])
    direction = muon_direction(torch.tensor([4.0]), momentum, 0.75, nesterov=True)
    torch.testing.assert_close(momentum, torch.tensor([2.5]))  # ¾·2 + ¼·4
    torch.testing.assert_close(direction, torch.tensor([2.875]))  # ¼·4 + ¾·2.5
    direction = muon_direction(torch.tensor([4.0]), momentum, 0.75, nesterov=False)
    torch.testing.assert_close(direction, torch.tensor([2.875]))


def test_matrices_of_a_shape() -> None:
    assert matrices_of((3, 4)) == (1, 3, 4)
    assert matrices_of((2, 3, 4)) == (2, 3, 4)
    assert matrices_of((8, 3, 2, 2)) == (1, 8, 12)


def test_learning_rate_scales() -> None:
    assert learning_rate_scale(4, 16, None) == learning_rate_scale(4, 16, "original") == 1.0
    assert learning_rate_scale(16, 4, None) == 2.0
    assert learning_rate_scale(4, 25, "match_rms_adamw") == pytest.approx(1.0)
