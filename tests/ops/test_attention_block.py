"""Attention over a part of the keys: kernels against the formula, and parts that merge into the whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megazero.ops.attention import attention_reference
from megazero.ops.attention_block import (
    attend,
    attend_backward,
    attend_backward_reference,
    attend_reference,
    merge_,
)

HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
CASES = {  # queries, keys, causal, masked
    "square, causal": (12, 12, True, False),
    "all queries, half of the keys": (12, 6, False, False),
    "half of the queries, all keys": (6, 12, False, False),
    "masked": (12, 6, False, True),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(heads: str, sq: int, sk: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    generator = torch.Generator().manual_seed(sq + sk)
    hq, hkv = HEADS[heads]
    shapes = [(2, sq, hq, d), (2, sk, hkv, d), (2, sk, hkv, d), (2, sq, hq, d)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def some_see_nothing(sq: int, sk: int, device: str) -> Tensor:
    mask = torch.rand(2, 1, sq, sk, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, 0, 3] = False
    mask[1, 0, :2] = False
    return mask.to(device)


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [5, 8, 64])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case: str, heads: str, d: int, dtype: torch.dtype, device: str) -> None:
    sq, sk, causal, masked = CASES[case]
    q, k, v, grad = inputs(heads, sq, sk, d, dtype, device)
    mask = some_see_nothing(sq, sk, device) if masked else None
    out, lse = attend(q, k, v, causal=causal, mask=mask)
    wide = [x.float() for x in (q, k, v)]
    wanted, wanted_lse = attend_reference(*wide, causal=causal, mask=mask)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_near(out, wanted, dtype)
    assert_near(lse, wanted_lse, dtype)
    if masked:
        assert not out[0, 3].any()
        assert bool((lse[0, :, 3] == -math.inf).all())
    # As in a ring: the queries have seen other keys before, so that lse is finite and above this part's.
    merged = torch.logaddexp(lse, torch.ones_like(lse))
    found = attend_backward(grad, q, k, v, out, merged, causal=causal, mask=mask)
    expected = attend_backward_reference(grad.float(), *wide, out.float(), merged, causal=causal, mask=mask)
    for name, a, b in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert a.shape == b.shape, name
        assert_near(a, b, dtype)


@pytest.mark.parametrize("heads", HEADS)
def test_the_formula_is_attentions(heads: str) -> None:
    """And its backward is autograd's."""
    *qkv, grad = inputs(heads, 9, 9, 8, torch.float32, "cpu")
    q, k, v = (x.requires_grad_() for x in qkv)
    wanted = attention_reference(q, k, v)
    wanted.backward(grad)
    with torch.no_grad():
        out, lse = attend_reference(q, k, v, causal=True)
        grads = attend_backward_reference(grad, q, k, v, out, lse, causal=True)
    torch.testing.assert_close(out, wanted)
    for found, x in zip(grads, (q, k, v), strict=True):
        torch.testing.assert_close(found, x.grad)


def test_parts_merge_into_the_whole() -> None:
    q, k, v, _ = inputs("gqa", 12, 12, 8, torch.float32, "cpu")
    mask = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 0] = True  # everyone sees something of the first part, some nothing of the second
    wanted, wanted_lse = attend(q, k, v, causal=False, mask=mask)
    out, lse = attend(q, k[:, :4], v[:, :4], causal=False, mask=mask[..., :4])
    lse = lse.contiguous()
    merge_(out, lse, *attend(q, k[:, 4:], v[:, 4:], causal=False, mask=mask[..., 4:]))
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)


def test_merging_nothing_changes_nothing() -> None:
    q, k, v, _ = inputs("gqa", 4, 4, 8, torch.float32, "cpu")
    out, lse = attend(q, k, v, causal=True)
    before, lse_before = out.clone(), lse.clone()
    merge_(out, lse, torch.zeros_like(out), torch.full_like(lse, -math.inf))
    assert torch.equal(out, before)
    assert torch.equal(lse, lse_before)
