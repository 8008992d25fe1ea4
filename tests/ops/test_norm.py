"""RMSNorm and LayerNorm against their formulas, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megazero.ops.norm import layer_norm, rms_norm, rms_norm_reference
from tests.ops.against import DTYPES, assert_equals_reference

SHAPES = [(3, 5, 32), (7, 48), (2, 3, 4, 8)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x off centre (RMSNorm must not subtract the mean), weight and bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2 + 0.7
    weight, bias = torch.randn(2, shape[-1], generator=generator) + 1.0
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, _ = inputs(shape, dtype)
    for eps in (1e-5, 0.5):
        assert_equals_reference(
            lambda x, w, eps=eps: rms_norm(x, w, eps), lambda x, w, eps=eps: rms_norm_reference(x, w, eps), x, weight
        )


def test_rms_norm_reference_is_torchs() -> None:
    x, weight, _ = inputs((3, 5, 32), torch.float32)
    torch.testing.assert_close(rms_norm_reference(x, weight, 1e-3), F.rms_norm(x, (32,), weight, 1e-3))


def test_rms_norm_of_a_transposed_tensor() -> None:
    x, weight, _ = inputs((3, 5, 32), torch.float32)
    assert_equals_reference(
        lambda x, w: rms_norm(x.transpose(0, 1), w, 1e-5).transpose(0, 1),
        lambda x, w: rms_norm_reference(x, w, 1e-5),
        x,
        weight,
    )


def test_rms_norm_of_zeros_is_zero() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), 1e-5)
    out.sum().backward()
    assert not out.any() and x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias

    assert_equals_reference(lambda x, w, b: layer_norm(x, w, b, 1e-3), formula, *inputs(shape, dtype))
