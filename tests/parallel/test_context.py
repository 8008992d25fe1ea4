"""Context parallelism: the split of a sequence, and both ways of attention against one process, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megazero.ops.attention import attention_reference, document_mask
from megazero.parallel import ring
from megazero.parallel.context import local_places, ring_document_mask, ring_order
from megazero.parallel.ring import ring_attention
from megazero.parallel.topology import AxisGroup, Topology
from megazero.parallel.ulysses import heads_to_tokens, logical_order, rank_order, tokens_to_heads

BATCH = 2
HEADS = {"MHA": (8, 8), "GQA": (8, 2), "MQA": (8, 1), "copies that overlap": (12, 3)}


def group_of(rank: int, size: int) -> AxisGroup:
    """For what does not communicate."""
    return AxisGroup("cp", tuple(range(size)), rank, None)


def logical(heads: tuple[int, int], s: int, d: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the result, the same on every rank."""
    generator = torch.Generator().manual_seed(s * d + sum(heads))
    shapes = [(BATCH, s, h, d) for h in (heads[0], heads[1], heads[1], heads[0])]
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def documents(s: int) -> Tensor:
    """Ids of packed documents; one sample has a document of one token, one is a single document."""
    ends = torch.zeros(BATCH, s, dtype=torch.int32)
    ends[0, [1, 2, s // 2, s - 3]] = 1
    return ends.cumsum(1).int()


def in_one_process(wholes: tuple[Tensor, ...], mask: Tensor | None) -> list[Tensor]:
    """The result and the gradients of q, k and v, by the formula in fp64."""
    *inputs, grad = (x.double() for x in wholes)
    inputs = [x.requires_grad_() for x in inputs]
    groups = inputs[0].shape[2] // inputs[1].shape[2]
    q, k, v = inputs[0], *(x.repeat_interleave(groups, dim=2) for x in inputs[1:])
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, is_causal=mask is None
    ).transpose(1, 2)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in inputs)]


def check_attention(comm: str, heads: tuple[int, int], d: int, s: int, packed: bool, bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    group = Topology.build(cp=torch.distributed.get_world_size()).group("cp")
    places = local_places(s, group)
    ids = documents(s) if packed else None
    wholes = logical(heads, s, d, dtype)
    expected = in_one_process(wholes, None if ids is None else document_mask(ids))
    q, k, v, grad = (x[:, places].contiguous() for x in wholes)
    for x in (q, k, v):
        x.requires_grad_()
    if comm == "p2p":
        out = ring_attention(q, k, v, None if ids is None else ring_document_mask(ids, places, group), group)
    else:
        mask = None if ids is None else document_mask(ids)
        mine = tokens_to_heads(q, k, v, group)
        assert mine[0].shape == (BATCH, s, heads[0] // group.size, d)
        out = heads_to_tokens(attention_reference(*mine, mask), group)
    assert out.shape == q.shape
    assert out.dtype == dtype
    out.backward(grad)
    for name, found, wanted in zip(["out", "dq", "dk", "dv"], [out, q.grad, k.grad, v.grad], expected, strict=True):
        assert found.dtype == dtype, name
        wanted = wanted[:, places]
        deviation = float((found.double() - wanted).norm() / wanted.norm())
        assert deviation <= (2e-2 if bf16 else 1e-6), (name, deviation)


def check_all(comm: str) -> None:
    for heads in HEADS.values():
        for packed in (False, True):
            check_attention(comm, heads, 8, 24, packed, False)
    for d, s in [(5, 16), (13, 8), (64, 64)]:  # odd heads; chunks of one token on 4 ranks; more than one tile
        check_attention(comm, HEADS["GQA"], d, s, True, False)
    check_attention(comm, HEADS["GQA"], 16, 32, False, True)
    check_attention(comm, HEADS["MQA"], 5, 32, True, True)


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_attention_equals_one_process(ranks: Any, comm: str, cp: int) -> None:
    ranks.run(check_all, cp, comm)


def test_three_ranks(ranks: Any) -> None:
    """Nothing depends on a power of two; 12 query and 4 key/value heads over 3 ranks: lcm(4, 3) copies."""
    ranks.run(check_attention, 3, "a2a", (12, 4), 8, 18, True, False)
    ranks.run(check_attention, 3, "p2p", (12, 4), 8, 18, True, False)


def check_two_graphs() -> None:
    """Gradients of a second graph over the same inputs add up, as with any operation."""
    group = Topology.build(cp=2).group("cp")
    q, k, v, grad = (x[:, local_places(8, group)] for x in logical(HEADS["GQA"], 8, 4, torch.float32))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    ring_attention(*leaves, None, group).backward(grad)
    once = [x.grad.clone() for x in leaves]
    ring_attention(*leaves, None, group).backward(grad)
    for x, first in zip(leaves, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * first)


def test_graphs_add_up(ranks: Any) -> None:
    ranks.run(check_two_graphs, 2)


def check_the_wire(heads: tuple[int, int]) -> None:
    """What a rank sends: a ring 2 · kv once round in the type of the model, then again with fp32 gradients all the way;
    key/value heads are never repeated."""
    topology = Topology.build(cp=torch.distributed.get_world_size())
    group, size = topology.group("cp"), topology.size("cp")
    q, k, v, grad = (x[:, local_places(32, group)] for x in logical(heads, 32, 8, torch.bfloat16))
    q.requires_grad_()
    out = ring_attention(q, k, v, None, group)
    forward = topology.traffic.totals()["cp", "send"]
    assert forward.bytes == (size - 1) * 2 * k.numel() * 2
    out.backward(grad)
    both = topology.traffic.totals()["cp", "send"]
    assert both.bytes == 2 * forward.bytes + size * 2 * k.numel() * 4
    assert both.calls == 2 * (size - 1) + size


def test_what_a_ring_sends(ranks: Any) -> None:
    ranks.run(check_the_wire, 2, HEADS["GQA"])
    ranks.run(check_the_wire, 4, HEADS["MQA"])


@given(st.integers(1, 6), st.integers(1, 5))
def test_every_token_is_on_one_rank_and_work_is_even(cp: int, chunk: int) -> None:
    s = 2 * cp * chunk
    shares = [local_places(s, group_of(rank, cp)) for rank in range(cp)]
    assert sorted(torch.cat(shares).tolist()) == list(range(s))
    assert all(bool((share.diff() > 0).all()) for share in shares)  # ascending: a rank's own block is plainly causal
    assert len({int((share + 1).sum()) for share in shares}) == 1  # keys that its queries see
    assert torch.equal(ring_order(s, group_of(0, cp), torch.device("cpu")), torch.cat(shares))


def test_places_by_hand() -> None:
    assert local_places(8, group_of(0, 2)).tolist() == [0, 1, 6, 7]
    assert local_places(8, group_of(1, 2)).tolist() == [2, 3, 4, 5]


@given(st.integers(1, 4), st.integers(1, 3))
def test_orders_are_opposites(cp: int, chunk: int) -> None:
    s = 2 * cp * chunk
    x = torch.arange(2 * s * 3).view(2, s, 3)
    parts = rank_order(x, cp)
    for rank in range(cp):
        assert torch.equal(parts[rank], x[:, local_places(s, group_of(rank, cp))])
    assert torch.equal(logical_order(parts), x)


@given(st.integers(1, 4), st.integers(1, 3))
def test_ring_masks_are_rows_and_columns_of_the_whole(cp: int, chunk: int) -> None:
    s = 2 * cp * chunk
    ids = torch.randint(0, 3, (BATCH, s), generator=torch.Generator().manual_seed(s)).sort(1).values
    whole = document_mask(ids)
    for rank in range(cp):
        group = group_of(rank, cp)
        places = local_places(s, group)
        order = ring_order(s, group, torch.device("cpu"))
        assert torch.equal(ring_document_mask(ids, places, group), whole[:, :, places][..., order])


@pytest.mark.parametrize("cp", [2, 4])
def test_every_rank_computes_equally_much(cp: int) -> None:
    """And nothing that is hidden: each step's rectangle is seen by causality, whole or (the own one) as a triangle."""
    length = 8
    for step in range(cp):
        sizes = set()
        for rank in range(cp):
            group = group_of(rank, cp)
            places = local_places(cp * length, group)
            keys = local_places(cp * length, group_of((rank - step) % cp, cp))
            part = ring._part(step, length, group, None)
            seen = places[part.queries].unsqueeze(1) >= keys[part.keys]
            assert torch.equal(seen, torch.ones_like(seen).tril() if part.causal else torch.ones_like(seen))
            sizes.add(int(seen.sum()))
        assert len(sizes) == 1
