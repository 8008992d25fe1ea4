"""torch's fused AdamW against the formula over several steps, each hyper-parameter felt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megazero.ops.adam import adamw_reference, fused_adamw

STEPS = 6
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "lr": {"lr": 0.1},
    "first beta": {"betas": (0.5, 0.95)},
    "second beta": {"betas": (0.9, 0.999)},
    "eps": {"eps": 0.3},
    "weight decay": {"weight_decay": 0.0},
}


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 1e-3, 1e3]).repeat_interleave(7)
    return [torch.randn(21, generator=generator) * sizes for _ in range(STEPS)]


def by_formula(settings: dict[str, Any]) -> Tensor:
    weight, first, second = torch.linspace(-2, 2, 21), torch.zeros(21), torch.zeros(21)
    for step, gradient in enumerate(gradients(), start=1):
        adamw_reference(weight, gradient, first, second, step, **settings)
    return weight


@pytest.mark.parametrize("change", CHANGES)
def test_fused_equals_the_formula(change: str) -> None:
    settings = SETTINGS | CHANGES[change]
    weight = torch.nn.Parameter(torch.linspace(-2, 2, 21))
    groups = [{"params": [weight], "weight_decay": settings["weight_decay"]}]
    optimizer = fused_adamw(groups, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"])
    for gradient in gradients():
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), by_formula(settings), rtol=1e-5, atol=1e-6)
    if change != "defaults":
        assert (weight.detach() - by_formula(SETTINGS)).abs().max() > 1e-4


def test_the_formula_by_hand() -> None:
    """First step: both moments' corrections cancel, so the step is lr · g / (|g| + eps), beside the decay."""
    weight, gradient = torch.tensor([2.0, 2.0]), torch.tensor([3.0, -0.5])
    adamw_reference(weight, gradient, torch.zeros(2), torch.zeros(2), 1, **SETTINGS)
    expected = 2.0 * (1 - 0.01 * 0.1) - 0.01 * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(weight, expected)
