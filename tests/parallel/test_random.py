"""Initial values: equal on every layout, of the right size, each parameter its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megazero.parallel.random import initial_values
from megazero.parallel.sharding import Box, ShardSpec, split, whole

SHAPE = (48, 40)
SPEC = replace(whole("layer.weight", SHAPE), init_std=0.02)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_are_cut_from_the_logical_tensor(dim: int, parts: int) -> None:
    cut = [initial_values(replace(SPEC, boxes=(split(dim, SHAPE, part, parts),)), 7) for part in range(parts)]
    assert torch.equal(torch.cat(cut, dim), initial_values(SPEC, 7))


def test_several_boxes_are_stacked() -> None:
    boxes = (Box((4, 0), (2, 40)), Box((30, 0), (3, 40)))
    logical = initial_values(SPEC, 7)
    assert torch.equal(initial_values(replace(SPEC, boxes=boxes), 7), torch.cat([logical[4:6], logical[30:33]]))


def test_spread() -> None:
    values = initial_values(replace(whole("w", (400, 500)), init_std=0.02), 0)
    assert values.dtype == torch.float32
    assert values.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(values.mean().item()) < 5 * 0.02 / 200_000**0.5
    assert 0.0026 < (values.abs() > 3 * 0.02).float().mean().item() < 0.0028 * 1.1  # a normal distribution's tail


def test_seed_and_name_matter_and_the_global_generator_does_not() -> None:
    torch.manual_seed(1)
    one = initial_values(SPEC, 7)
    torch.manual_seed(2)
    assert torch.equal(initial_values(SPEC, 7), one)
    assert torch.initial_seed() == 2
    for other in (initial_values(SPEC, 8), initial_values(replace(SPEC, name="layer.weighu"), 7)):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / one.numel() ** 0.5


def test_the_largest_seed_works() -> None:
    assert initial_values(SPEC, 2**31 - 1).isfinite().all()


def test_constants() -> None:
    assert initial_values(replace(SPEC, init_std=None), 7).tolist() == torch.zeros(SHAPE).tolist()
    ones = ShardSpec("norm.weight", (6,), (Box((2,), (3,)),), init_fill=1.0)
    assert initial_values(ones, 7).tolist() == [1.0, 1.0, 1.0]
