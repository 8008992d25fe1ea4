"""Boxes: a flat slice is tiled exactly, at the right offsets, by few boxes; specs cut what they say."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megazero.parallel import sharding
from megazero.parallel.sharding import Box, ShardSpec, flat_slice_boxes, spec_of, spec_slice_boxes, split, whole

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def slices(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape and a slice of its elements, empty ones and the whole among them."""
    shape = draw(shapes)
    start = draw(st.integers(0, math.prod(shape)))
    return shape, start, draw(st.integers(start, math.prod(shape)))


@st.composite
def specs(draw: st.DrawFn) -> ShardSpec:
    """Several row ranges of a range of columns, in any order, as fused weights have them."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    columns = [draw(st.integers(0, n - 1)) for n in shape[1:]]
    widths = [draw(st.integers(1, n - at)) for n, at in zip(shape[1:], columns, strict=True)]
    starts = sorted(draw(st.sets(st.integers(0, shape[0] - 1), min_size=1, max_size=3)))
    boxes = []
    for at, end in zip(starts, [*starts[1:], shape[0]], strict=True):
        boxes.append(Box((at, *columns), (draw(st.integers(1, end - at)), *widths)))
    return ShardSpec("w", shape, tuple(draw(st.permutations(boxes))))


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose elements are their own flat positions."""
    return torch.arange(math.prod(shape)).reshape(shape)


def assert_tiles(pieces: list[tuple[int, Box]], logical: torch.Tensor, wanted: torch.Tensor) -> None:
    """The pieces, each copied to its offset, make up `wanted`, without gap or overlap."""
    filled = 0
    for at, box in pieces:
        assert at == filled
        assert box.numel > 0
        assert torch.equal(box.of(logical).flatten(), wanted[at : at + box.numel])
        filled += box.numel
    assert filled == len(wanted)


@given(slices())
def test_flat_slice_is_tiled_exactly(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    pieces = flat_slice_boxes(shape, start, stop)
    assert_tiles(pieces, numbered(shape), torch.arange(start, stop))
    assert len(pieces) <= max(2 * len(shape) - 1, 1)


@given(shapes)
def test_whole_tensor_is_one_box(shape: tuple[int, ...]) -> None:
    assert flat_slice_boxes(shape, 0, math.prod(shape)) == [(0, Box((0,) * len(shape), shape))]


@given(shapes, st.integers(1, 7))
def test_equal_slices_of_a_bucket_cover_each_element_once(shape: tuple[int, ...], parts: int) -> None:
    numel = math.prod(shape)
    share = -(-numel // parts)
    seen = torch.zeros(shape, dtype=torch.int64)
    for part in range(parts):
        for _, box in flat_slice_boxes(shape, min(part * share, numel), min((part + 1) * share, numel)):
            box.of(seen).add_(1)
    assert (seen == 1).all()


def test_flat_slice_written_out() -> None:
    # rows of a 2 × 3 × 4 tensor have 12 elements; 5 … 21 is the end of the first row and most of the second
    assert flat_slice_boxes((2, 3, 4), 5, 22) == [
        (0, Box((0, 1, 1), (1, 1, 3))),
        (3, Box((0, 2, 0), (1, 1, 4))),
        (7, Box((1, 0, 0), (1, 2, 4))),
        (15, Box((1, 2, 0), (1, 1, 2))),
    ]
    assert flat_slice_boxes((4, 3), 5, 5) == []
    assert flat_slice_boxes((3, 0), 0, 0) == []


@given(specs(), st.data())
def test_slice_of_a_spec_is_tiled_exactly(spec: ShardSpec, data: st.DataObject) -> None:
    logical = numbered(spec.shape)
    local = spec.local(logical)
    start = data.draw(st.integers(0, local.numel()))
    stop = data.draw(st.integers(start, local.numel()))
    pieces = spec_slice_boxes(spec, start, stop)
    assert_tiles(pieces, logical, local.flatten()[start:stop])
    assert len(pieces) <= len(spec.boxes) * max(2 * len(spec.shape) - 1, 1)


@given(specs())
def test_local_has_the_local_shape(spec: ShardSpec) -> None:
    assert tuple(spec.local(numbered(spec.shape)).shape) == spec.local_shape


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4), st.data())
def test_split_parts_put_together_are_the_tensor(shape: list[int], parts: int, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] *= parts
    logical = numbered(tuple(shape))
    boxes = [split(dim, tuple(shape), part, parts) for part in range(parts)]
    assert torch.equal(torch.cat([box.of(logical) for box in boxes], dim=dim), logical)
    assert len({box.shape for box in boxes}) == 1


def test_split_that_does_not_divide_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match=r"dim 1 of \(4, 6\) does not divide into 4"):
        split(1, (4, 6), 0, 4)


def test_local_of_a_fused_weight() -> None:
    logical = numbered((6, 2))
    spec = ShardSpec("qkv", (6, 2), (Box((1, 0), (1, 2)), Box((3, 0), (2, 2))))
    assert spec.local_shape == (3, 2)
    assert spec.local(logical).tolist() == [[2, 3], [6, 7], [8, 9]]


def test_box_is_a_view() -> None:
    logical = torch.zeros(3, 4)
    Box((1, 2), (2, 1)).of(logical).fill_(1)
    assert logical.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]


def test_parameters_of_foreign_modules_are_whole() -> None:
    linear = nn.Linear(3, 2)
    assert spec_of("fc.weight", linear.weight) == ShardSpec("fc.weight", (2, 3), (Box((0, 0), (2, 3)),))
    spec = whole("mine", (2, 3))
    linear.weight.shard_spec = spec
    assert spec_of("fc.weight", linear.weight) is spec


def test_first_replica_owns() -> None:
    spec = ShardSpec("w", (2,), (Box((0,), (2,)),), replicas=(4, 6))
    assert [spec.owned_by(rank) for rank in (0, 4, 6)] == [False, True, False]


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(sharding)
    assert results.attempted > 0
    assert results.failed == 0
