"""LAMB's parts, put together, against the formula; each hyper-parameter felt, and the ratio's edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megazero.ops.lamb import lamb_direction, lamb_moments, lamb_reference, trust_ratio

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
BOUNDS = {"min_coeff": 0.01, "max_coeff": 10.0}
CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "first beta": {"betas": (0.5, 0.95)},
    "second beta": {"betas": (0.9, 0.999)},
    "eps": {"eps": 0.3},
    "weight decay": {"weight_decay": 0.0},
    "least ratio": {"min_coeff": 2.0},
    "largest ratio": {"max_coeff": 0.5},
}


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 1e-3, 1e3]).repeat_interleave(7)
    return [torch.randn(21, generator=generator) * sizes for _ in range(6)]


def by_formula(change: str) -> Tensor:
    weight, first, second = torch.linspace(-2, 2, 21), torch.zeros(21), torch.zeros(21)
    for step, gradient in enumerate(gradients(), start=1):
        settings = SETTINGS | BOUNDS | CHANGES[change]
        weight, first, second = lamb_reference(weight, gradient, first, second, step, lr=0.01, **settings)
    return weight


@pytest.mark.parametrize("change", CHANGES)
def test_parts_equal_the_formula(change: str) -> None:
    settings = SETTINGS | BOUNDS | CHANGES[change]
    bounds = settings.pop("min_coeff"), settings.pop("max_coeff")
    weight, first, second = torch.linspace(-2, 2, 21), torch.zeros(21), torch.zeros(21)
    for step, gradient in enumerate(gradients(), start=1):
        lamb_moments(gradient, first, second, settings["betas"])
        direction = lamb_direction(weight, first, second, step, **settings)
        ratio = trust_ratio(float(weight.norm()), float(direction.norm()), *bounds)
        weight -= 0.01 * ratio * direction
    torch.testing.assert_close(weight, by_formula(change), rtol=1e-5, atol=1e-6)
    if change != "defaults":
        assert (weight - by_formula("defaults")).abs().max() > 1e-4


def test_first_step_by_hand() -> None:
    """Corrected moments of one gradient give its sign, so u = sign(g) + λw, and ‖lr·ratio·u‖ = lr·‖w‖."""
    weight, gradient = torch.tensor([3.0, 4.0]), torch.tensor([0.5, -2.0])
    first, second = torch.zeros(2), torch.zeros(2)
    lamb_moments(gradient, first, second, (0.9, 0.999))
    direction = lamb_direction(weight, first, second, 1, betas=(0.9, 0.999), eps=0.0, weight_decay=0.5)
    torch.testing.assert_close(direction, torch.tensor([2.5, 1.0]))
    torch.testing.assert_close(trust_ratio(5.0, float(direction.norm()), 0.01, 10.0), 5.0 / 7.25**0.5)


def test_without_bias_correction_and_with_eps_inside_the_root() -> None:
    first, second, weight = torch.tensor([0.1]), torch.tensor([0.04]), torch.zeros(1)
    plain = lamb_direction(weight, first, second, 1, betas=(0.9, 0.9), eps=0.0, weight_decay=0.0, bias_correction=False)
    torch.testing.assert_close(plain, torch.tensor([0.5]))
    inside = lamb_direction(
        weight, first, second, 1, betas=(0.9, 0.9), eps=0.09, weight_decay=0.0, eps_inside_sqrt=True
    )
    torch.testing.assert_close(inside, torch.tensor([1.0 / 0.7]))  # 0.1 / 0.1 over the root of 0.04 / 0.1 + 0.09


@pytest.mark.parametrize(
    ("weight", "direction", "ratio"), [(0, 1, 1), (1, 0, 1), (1, 1e6, 0.01), (1e6, 1, 10), (3, 2, 1.5)]
)
def test_ratio(weight: float, direction: float, ratio: float) -> None:
    assert trust_ratio(weight, direction, 0.01, 10.0) == ratio
