"""Attention: SDPA against explicit probabilities, grouped heads, causality, and documents that must not leak."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megazero.ops.attention import attention, attention_reference, document_mask
from tests.ops.against import DTYPES, assert_equals_reference

B, S, D = 2, 7, 8
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 6]])


def qkv(heads: str = "gqa", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    hq, hkv = HEADS[heads]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, S, h, D, generator=generator).to(dtype) for h in (hq, hkv, hkv)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_equals_reference(heads: str, packed: bool, dtype: torch.dtype) -> None:
    mask = document_mask(DOCUMENTS) if packed else None
    assert_equals_reference(
        lambda q, k, v: attention(q, k, v, mask),
        lambda q, k, v: attention_reference(q, k, v, mask),
        *qkv(heads, dtype),
    )


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_by_hand(function) -> None:
    """One query at a time, in a loop: query head h reads kv head h // (hq / hkv)."""
    q, k, v = qkv("gqa")
    expected = torch.empty_like(q)
    for b in range(B):
        for t in range(S):
            for h in range(4):
                scores = k[b, : t + 1, h // 2] @ q[b, t, h] / math.sqrt(D)
                expected[b, t, h] = scores.softmax(0) @ v[b, : t + 1, h // 2]
    torch.testing.assert_close(function(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_document_mask() -> None:
    mask = document_mask(torch.tensor([[3, 3, 4]]))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_a_document_equals_itself_alone(function) -> None:
    q, k, v = qkv()
    out = function(q, k, v, document_mask(DOCUMENTS))
    for start, stop in [(0, 3), (3, 5), (5, 7)]:
        alone = function(*(x[:1, start:stop] for x in (q, k, v)))
        torch.testing.assert_close(out[:1, start:stop], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_nothing_leaks_from_other_documents_or_the_future(function) -> None:
    """Bit for bit, and no gradient flows back either."""
    inputs = [x.requires_grad_() for x in qkv()]
    mask = document_mask(DOCUMENTS)
    out = function(*inputs, mask)
    for grad in torch.autograd.grad(out[0, 4].square().sum(), inputs[1:]):  # the second token of the second document
        assert grad[0, 3].any() and grad[0, 4].any()
        grad[0, 3:5] = 0
        assert not grad.any()
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[0, :3] = 1e4
    again = function(*changed, mask)
    assert torch.equal(again[0, 3:], out[0, 3:]) and torch.equal(again[1], out[1])
    assert not torch.equal(again[0, :3], out[0, :3])
    for x in changed:
        x[0, 4] = -50.0
    assert torch.equal(function(*changed, mask)[0, 3], out[0, 3])  # the future in the same document


def test_dropout_of_probabilities() -> None:
    """Rate 0.5 zeroes about half of them and doubles the others; with one-hot values the output shows them."""
    s = 64
    q, k = torch.zeros(1, s, 2, D), torch.zeros(1, s, 2, D)
    v = torch.eye(s).view(1, s, 1, s).expand(1, s, 2, s)
    at = torch.arange(s)
    coordinates = [torch.zeros(1, 1, 1, 1).long(), torch.arange(2).view(1, -1, 1, 1), at.view(1, 1, -1, 1), at]
    out = attention_reference(q, k, v, None, 0.5, 1, coordinates)  # [1, s, 2, s]: row t is t's probabilities
    full = attention_reference(q, k, v)
    kept = out != 0
    torch.testing.assert_close(out, torch.where(kept, 2 * full, 0.0))
    seen = full > 0
    assert kept[seen].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (kept[0, :, 0] ^ kept[0, :, 1]).any()  # heads draw their own
