"""A few parameters in two buckets whose slices cut them anywhere, as ZeRO's do, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from megazero.engine.sharded import Shard
from megazero.parallel.collectives import gather_objects
from megazero.parallel.topology import AxisGroup

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (10, 6),
    "layer.a.weight": (7, 5),
    "layer.a.bias": (7,),
    "layer.b.weight": (12, 8),
    "layer.experts": (3, 4, 5),
    "layer.c.weight": (6, 20),
    "norm.weight": (8,),
    "head.weight": (10, 6),
}
BUCKETS = [list(SHAPES)[:3], list(SHAPES)[3:]]


def weights() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradient(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator) * 10.0 ** (step % 3 - 1)


def train_whole(optimizer: torch.optim.Optimizer, whole: dict[str, nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for name, parameter in whole.items():
            parameter.grad = gradient(name, step)
        optimizer.step()


def shards_of(optimizer: torch.optim.Optimizer, whole: dict[str, nn.Parameter], group: AxisGroup) -> list[Shard]:
    """This rank's slice of each bucket, by parameter; their tensors are copies."""
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    found = []
    for names in BUCKETS:
        total = sum(math.prod(SHAPES[name]) for name in names)
        width = -(-total // group.size)
        low, high, at = group.rank * width, (group.rank + 1) * width, 0
        for name in names:
            numel = math.prod(SHAPES[name])
            start, stop = max(low - at, 0), min(high - at, numel)
            at += numel
            if start < stop:
                tensor = whole[name].detach().flatten()[start:stop].clone()
                found.append(Shard(name, SHAPES[name], start, stop, tensor, tensor, groups[id(whole[name])]))
    return found


def train_sliced(optimizer: Any, shards: list[Shard], group: AxisGroup, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for shard in shards:
            shard.grad = gradient(shard.name, step).flatten()[shard.start : shard.stop].clone()
        optimizer.step_sharded(shards, group)


def gathered(shards: list[Shard], group: AxisGroup) -> dict[str, Tensor]:
    """The parameters that the slices of all ranks make up."""
    made = {name: torch.full((math.prod(shape),), math.nan) for name, shape in SHAPES.items()}
    for pieces in gather_objects([(s.name, s.start, s.stop, s.tensor) for s in shards], group):
        for name, start, stop, tensor in pieces:
            made[name][start:stop] = tensor
    return {name: made[name].view(shape) for name, shape in SHAPES.items()}
