"""How parameters are laid out in buckets: order, units, limits, even slices, and what memory a rank holds for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megazero.parallel.sharding import ShardSpec, whole
from megazero.parallel.topology import AxisGroup
from megazero.zero.buckets import ALIGNMENT, Bucket, make_buckets


def group_of(size: int, rank: int = 0) -> AxisGroup:
    return AxisGroup("zero", tuple(range(size)), rank, None)


def layout(
    model: nn.Module,
    units: tuple[str, ...] = (),
    size: int = 2,
    rank: int = 0,
    sharded: bool = True,
    limit: int | None = None,
) -> list[Bucket]:
    return make_buckets(model, list(units), group_of(size, rank), sharded=sharded, limit=limit)


def names(buckets: list[Bucket]) -> list[list[str]]:
    return [[place.name for place in bucket.placed] for bucket in buckets]


def flat_model(*sizes: int) -> nn.Module:
    model = nn.Module()
    for index, size in enumerate(sizes):
        model.register_parameter(f"p{index}", nn.Parameter(torch.arange(float(size)) + 100 * index))
    return model


def zeros(place) -> torch.Tensor:
    return torch.zeros(place.spec.local_shape)


def test_reverse_registration_order_within_units() -> None:
    model = nn.ModuleDict(
        {"first": nn.Linear(2, 3), "blocks": nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), "last": nn.Linear(3, 2)}
    )
    assert names(layout(model)) == [
        [
            "last.bias",
            "last.weight",
            "blocks.1.bias",
            "blocks.1.weight",
            "blocks.0.bias",
            "blocks.0.weight",
            "first.bias",
            "first.weight",
        ]
    ]
    assert names(layout(model, ("blocks.0", "blocks.1"))) == [
        ["last.bias", "last.weight", "first.bias", "first.weight"],
        ["blocks.1.bias", "blocks.1.weight"],
        ["blocks.0.bias", "blocks.0.weight"],
    ]


def test_units_are_whole_names_and_the_innermost_counts() -> None:
    model = nn.ModuleDict(
        {
            "b1": nn.ModuleDict({"in": nn.Linear(2, 2, bias=False), "out": nn.Linear(2, 2, bias=False)}),
            "b10": nn.Linear(2, 2, bias=False),
        }
    )
    assert names(layout(model, ("b1", "b1.in"))) == [["b10.weight"], ["b1.out.weight"], ["b1.in.weight"]]


def test_limit() -> None:
    model = flat_model(10, 20, 500, 30, 60, 70)
    assert names(layout(model, limit=100)) == [["p5"], ["p4", "p3"], ["p2"], ["p1", "p0"]]
    assert names(layout(model, limit=1)) == [[f"p{i}"] for i in range(5, -1, -1)]
    assert len(layout(model)) == 1


def test_frozen_parameters_are_left_alone_and_tied_ones_are_placed_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["a"].bias.requires_grad_(False)
    model["b"].weight = model["a"].weight
    assert names(layout(model)) == [["b.bias", "a.weight"]]


def test_parameters_summed_over_other_ranks_have_buckets_of_their_own() -> None:
    model, tp, pair = flat_model(4, 4, 4, 4), group_of(4), AxisGroup("tp", (2, 3), 0, None)
    for name, summed in [("p0", tp), ("p1", pair), ("p2", None), ("p3", tp)]:
        spec = whole(name, (4,))
        getattr(model, name).shard_spec = ShardSpec(name, (4,), spec.boxes, grad_sum=summed)
    buckets = layout(model)
    assert names(buckets) == [["p3", "p0"], ["p2"], ["p1"]]
    assert [bucket.grad_sum for bucket in buckets] == [tp, None, pair]


@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    size=st.integers(1, 5),
    limit=st.none() | st.integers(1, 600),
    sharded=st.booleans(),
)
def test_invariants(sizes: list[int], size: int, limit: int | None, sharded: bool) -> None:
    """Each element in one place; slices equal, aligned, disjoint, covering; owned is the slice or all."""
    model = flat_model(*sizes)
    by_rank = [layout(model, size=size, rank=rank, limit=limit, sharded=sharded) for rank in range(size)]
    assert sorted(name for bucket in names(by_rank[0]) for name in bucket) == sorted(f"p{i}" for i in range(len(sizes)))
    for same in zip(*by_rank, strict=True):
        bucket = same[0]
        assert bucket.length % (size * ALIGNMENT) == 0
        assert bucket.numel <= bucket.length < bucket.numel + size * ALIGNMENT
        assert len(bucket.placed) == 1 or bucket.numel <= (limit or 10**9)
        ends = [0] + [place.stop for place in bucket.placed]
        assert [place.start for place in bucket.placed] == ends[:-1] and ends[-1] == bucket.numel
        width = bucket.length // size
        assert [b.slice for b in same] == [(rank * width, (rank + 1) * width) for rank in range(size)]
        assert [b.owned for b in same] == ([b.slice for b in same] if sharded else [(0, bucket.length)] * size)
        pieces = [(place.name, lo, hi) for b in same for place, lo, hi in b.parts(*b.slice)]
        assert sum(hi - lo for _, lo, hi in pieces) == bucket.numel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocate_binds_parameters_and_makes_masters_before_the_cast(dtype: torch.dtype) -> None:
    fine = 1 + 2.0**-12  # not a bf16 number
    for rank, sharded in [(0, True), (1, True), (1, False)]:
        model = flat_model(100, 80)
        (bucket,) = layout(model, rank=rank, sharded=sharded)
        bucket.allocate(
            dtype, torch.device("cpu"), lambda place: torch.full(place.spec.local_shape, fine + int(place.name[1]))
        )
        assert model.p0.dtype == dtype and model.p0.tolist() == [fine if dtype == torch.float32 else 1.0] * 100
        assert model.p1.data_ptr() == bucket.values.data_ptr()  # reversed: p1 is first
        assert bucket.master.dtype == bucket.grads.dtype == torch.float32
        whole_master = [fine + 1] * 80 + [fine] * 100 + [0.0] * (bucket.length - 180)
        assert bucket.master.tolist() == pytest.approx(whole_master[slice(*bucket.owned)], rel=1e-7)
        assert (bucket.master.data_ptr() == bucket.values[bucket.owned[0] :].data_ptr()) == (dtype == torch.float32)


def test_cast_master_writes_the_owned_part_alone() -> None:
    (bucket,) = layout(flat_model(200), rank=1)
    bucket.allocate(torch.bfloat16, torch.device("cpu"), zeros)
    bucket.master += 1 + 2.0**-12
    bucket.cast_master()
    low, high = bucket.owned
    assert not bucket.values[:low].any() and bucket.values[low:high].tolist() == [1.0] * (high - low)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_rank_are_even(size: int, dtype: torch.dtype) -> None:
    """One huge embedding and many tiny norms, each a unit of its own: what DESIGN.md promises, max/min <= 1.01."""
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(16_000, 64), "norms": nn.ModuleList(nn.LayerNorm(32) for _ in range(64))}
    )
    units = tuple(f"norms.{index}" for index in range(64))
    held = []
    for rank in range(size):
        total = 0
        for bucket in layout(model, units, size, rank):
            bucket.allocate(dtype, torch.device("cpu"), zeros)
            buffers = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in (bucket.values, bucket.grads, bucket.master)
            }
            moments = 2 * 4 * sum(hi - lo for _, lo, hi in bucket.parts(*bucket.owned))
            total += sum(buffers.values()) + moments
        held.append(total)
    assert max(held) / min(held) <= 1.01
