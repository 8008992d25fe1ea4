"""Lion's update against its formula, each hyper-parameter felt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megazero.ops.lion import lion_reference, lion_update

SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.1},
    "first beta": {"betas": (0.1, 0.99)},
    "second beta": {"betas": (0.9, 0.5)},
    "weight decay": {"weight_decay": 0.0},
}


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(21, generator=generator) for _ in range(6)]


def by_formula(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    weight, momentum = torch.linspace(-2, 2, 21), torch.zeros(21)
    for gradient in gradients():
        weight, momentum = lion_reference(weight, gradient, momentum, **settings)
    return weight, momentum


@pytest.mark.parametrize("change", CHANGES)
def test_update_equals_the_formula(change: str) -> None:
    settings = SETTINGS | CHANGES[change]
    weight, momentum = torch.linspace(-2, 2, 21), torch.zeros(21)
    for gradient in gradients():
        lion_update(weight, gradient, momentum, **settings)
    torch.testing.assert_close((weight, momentum), by_formula(settings), rtol=1e-6, atol=1e-6)
    if change != "defaults":
        assert (weight - by_formula(SETTINGS)[0]).abs().max() > 1e-3


def test_the_formula_by_hand() -> None:
    """First step: the sign of the gradient; then β₁m outweighs a small gradient of the other sign."""
    weight, momentum = torch.tensor([2.0, 2.0]), torch.zeros(2)
    lion_update(weight, torch.tensor([3.0, -0.5]), momentum, **SETTINGS)
    torch.testing.assert_close(weight, torch.tensor([1.998 - 0.01, 1.998 + 0.01]))
    torch.testing.assert_close(momentum, torch.tensor([0.03, -0.005]))
    before = weight.clone()
    lion_update(weight, torch.tensor([-0.2, 0.01]), momentum, lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    torch.testing.assert_close(weight - before, torch.tensor([-0.01, 0.01]))
