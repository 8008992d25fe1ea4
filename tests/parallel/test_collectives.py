"""Every collective on 1 to 4 gloo ranks against sums done by hand, several under way at once, types on the wire."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megazero.parallel.collectives import (
    all_gather,
    all_gather_slices,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    gather_objects,
    pass_on,
    reduce_scatter_slices,
)
from megazero.parallel.topology import AxisGroup, Topology

WIDTH = 6  # of a slice
SIZES = [1, 2, 3, 4]


def world() -> AxisGroup:
    return Topology.build().group("world")


def flat_of(rank: int, size: int, turn: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    return torch.randn(size * WIDTH, generator=generator)


def own_slice(group: AxisGroup) -> slice:
    return slice(group.rank * WIDTH, (group.rank + 1) * WIDTH)


def check_slices(bf16: bool) -> None:
    group = world()
    wire = torch.bfloat16 if bf16 else None
    flats = [flat_of(rank, group.size) for rank in range(group.size)]
    mine = flats[group.rank].clone()
    reduce_scatter_slices(mine, group, wire).wait()
    own = own_slice(group)
    expected = flats[group.rank][own].clone()  # own part first and unrounded, then ascending ranks
    for rank, flat in enumerate(flats):
        if rank != group.rank:
            expected += flat[own].to(wire or torch.float32)
    assert torch.equal(mine[own], expected)  # in fp32 whatever the wire, in this very order
    all_gather_slices(mine, group).wait()
    total = torch.stack([flat.double() for flat in flats]).sum(0)
    error = (mine.double() - total).abs().max()
    assert error <= (0.05 if bf16 else 1e-6)
    if bf16 and group.size > 1:
        assert error > 1e-6  # it was rounded on the way


def check_whole_tensors() -> None:
    group = world()
    rank, size = group.rank, group.size
    x = torch.arange(6.0).view(2, 3) + 10 * rank
    parts = [torch.arange(6.0).view(2, 3) + 10 * r for r in range(size)]
    for dim in (0, 1, -1):
        assert torch.equal(all_gather(x, group, dim), torch.cat(parts, dim))
    assert torch.equal(all_gather(x.t(), group, 0), torch.cat([part.t() for part in parts]))  # not contiguous
    assert torch.equal(all_reduce(x.clone(), group), torch.stack(parts).sum(0))
    assert torch.equal(all_reduce(x.clone(), group, "max"), parts[-1])
    assert torch.equal(all_reduce(x.clone(), group, "min"), parts[0])
    in_place = x.clone()
    assert all_reduce(in_place, group) is in_place
    assert gather_objects({"rank": rank}, group) == [{"rank": r} for r in range(size)]
    # Part i of rank r is 10 r + i; and a transposed input, which is not contiguous.
    numbered = torch.arange(float(size)) + 10 * rank
    exchanged = torch.arange(float(size)) * 10 + rank
    assert torch.equal(all_to_all(numbered, group), exchanged)
    twice = torch.stack([numbered, numbered + 0.5])
    assert torch.equal(all_to_all(twice.t(), group), torch.stack([exchanged, exchanged + 0.5]).t())
    if size > 1:
        received, pending = pass_on(x, group)
        pending.wait()
        assert torch.equal(received, parts[rank - 1])
    barrier(group)


def check_several_at_once() -> None:
    """Reductions and gathers of different buffers overlap and are waited for in another order than begun."""
    group = world()
    own = own_slice(group)
    reduced = [flat_of(group.rank, group.size, turn) for turn in range(3)]
    gathered = [torch.full((group.size * WIDTH,), torch.nan) for _ in range(2)]
    for turn, buffer in enumerate(gathered):
        buffer[own] = group.rank + 100.0 * turn
    pending = [
        reduce_scatter_slices(reduced[0], group),
        all_gather_slices(gathered[0], group),
        reduce_scatter_slices(reduced[1], group, torch.bfloat16),
        all_gather_slices(gathered[1], group),
        reduce_scatter_slices(reduced[2], group),
    ]
    for one in reversed(pending):
        one.wait()
        one.wait()  # a second wait adds nothing
    for turn, buffer in enumerate(reduced):
        total = torch.stack([flat_of(rank, group.size, turn)[own] for rank in range(group.size)]).sum(0)
        torch.testing.assert_close(buffer[own], total, rtol=0, atol=0.05 if turn == 1 else 1e-6)
    for turn, buffer in enumerate(gathered):
        expected = torch.arange(group.size).repeat_interleave(WIDTH) + 100.0 * turn
        assert torch.equal(buffer, expected)


def check_all() -> None:
    check_slices(bf16=False)
    check_slices(bf16=True)
    check_whole_tensors()
    check_several_at_once()


@pytest.mark.parametrize("size", SIZES)
def test_values(ranks: Any, size: int) -> None:
    ranks.run(check_all, size)


def check_axes_apart() -> None:
    """Groups of a 2 × 2 topology: global ranks are not group ranks, and both axes may be busy together."""
    topology = Topology.build(tp=2)
    rank = topology.rank
    tp, dp = topology.group("tp"), topology.group("zero")
    tp_flat, dp_flat = torch.full((4,), float(rank)), torch.full((4,), float(rank))
    pending = [reduce_scatter_slices(dp_flat, dp), reduce_scatter_slices(tp_flat, tp)]
    for one in pending:
        one.wait()
    assert tp_flat.view(2, 2)[tp.rank].tolist() == [float(sum(tp.ranks))] * 2
    assert dp_flat.view(2, 2)[dp.rank].tolist() == [float(sum(dp.ranks))] * 2
    mine = torch.full((2,), float(rank))
    assert all_gather(mine, dp, 0).tolist() == [float(r) for r in dp.ranks for _ in range(2)]


def test_groups_that_are_not_the_world(ranks: Any) -> None:
    ranks.run(check_axes_apart, 4)


class Sends:
    """What was handed to torch.distributed, and what a rank pays on the wire for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[torch.dtype, int]] = []
        batch = dist.batch_isend_irecv

        def counted(ops: list[dist.P2POp]) -> list[dist.Work]:
            self.sent += [(op.tensor.dtype, op.tensor.numel()) for op in ops if op.op is dist.isend]
            return batch(ops)

        monkeypatch.setattr(dist, "batch_isend_irecv", counted)


def check_volume() -> None:
    group = world()
    with pytest.MonkeyPatch.context() as patch:
        sends = Sends(patch)
        flat = flat_of(group.rank, group.size)
        reduce_scatter_slices(flat, group, torch.bfloat16).wait()
        assert sends.sent == [(torch.bfloat16, WIDTH)] * (group.size - 1)
        all_gather_slices(flat, group).wait()
        assert sends.sent[group.size - 1 :] == [(torch.float32, WIDTH)] * (group.size - 1)


def test_volume_is_n_minus_1_slices(ranks: Any) -> None:
    ranks.run(check_volume, 3)


def test_a_group_of_one_returns_its_input() -> None:
    group = Topology.single().group("world")
    x = torch.randn(4)
    before = x.clone()
    assert all_reduce(x, group) is x
    assert all_gather(x, group, 0) is x
    reduce_scatter_slices(x, group, torch.bfloat16).wait()
    all_gather_slices(x, group).wait()
    barrier(group)
    assert gather_objects(x, group)[0] is x
    assert torch.equal(x, before)


def dropped_before_it_arrived() -> None:
    group = Topology.build(dp=2).group("dp")
    mine = torch.full((1_000_000,), float(group.rank))
    if group.rank == 0:
        time.sleep(1.0)  # this rank has not sent yet when the other one forgets that it waits
    sent = all_gather_slices(mine, group)
    if group.rank == 0:
        sent.wait()
    del sent
    assert broadcast(torch.full((1_000_000,), 1.0 + group.rank), group, 0)[0] == 1.0


def test_what_nobody_waits_for_does_not_block_what_comes_after(ranks: Any) -> None:
    ranks.run(dropped_before_it_arrived, 2, timeout=30)
