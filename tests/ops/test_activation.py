"""Activations against formulas written out, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megazero.ops.activation import UNGATED, swiglu, swiglu_reference
from tests.ops.against import DTYPES, assert_equals_reference


def example(dtype: torch.dtype, count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 4, 10, generator=generator) * 2).to(dtype) for _ in range(count)]


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "squared_relu": lambda x: torch.where(x > 0, x * x, 0.0),
}


def test_every_ungated_activation_has_a_formula_here() -> None:
    assert UNGATED.keys() == FORMULAS.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMULAS)
def test_ungated(name: str, dtype: torch.dtype) -> None:
    assert_equals_reference(UNGATED[name], FORMULAS[name], *example(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    assert_equals_reference(swiglu, swiglu_reference, *example(dtype, 2))


def test_swiglu_reference_by_hand() -> None:
    gate, up = example(torch.float32, 2)
    torch.testing.assert_close(swiglu_reference(gate, up), gate / (1 + torch.exp(-gate)) * up)


def test_swiglu_keeps_its_inputs_alone() -> None:
    gate, up = (x.requires_grad_() for x in example(torch.float32, 2))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])
