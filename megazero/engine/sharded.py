"""The protocol of optimizers that must see whole parameters, over cuts of them.

Such an optimizer has the attribute `whole_tensors = True` and the method `step_sharded(shards, group)`. Each rank gives
the ranges that it holds of each parameter (Shard); over the ranks of `group` the ranges of a parameter are disjoint and
together whole. Where nothing is cut (ZeRO stage 0, one process) the group is one of one member.

    w1 [4, 6]   0 ....... 16 ... 24      rank 0: Shard("w1", (4, 6), 0, 16, …)
                | rank 0 | rank 1 |      rank 1: Shard("w1", (4, 6), 16, 24, …), Shard("w2", …)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from megazero.base.errors import ConfigError
from megazero.parallel.collectives import gather_objects
from megazero.parallel.topology import AxisGroup


@dataclass
class Shard:
    """Elements [start, stop) of one flattened parameter, with what a step needs of them."""

    name: str
    """The parameter's, the same on all ranks."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    stop: int
    tensor: Tensor
    """[stop - start], the master, changed in place."""
    grad: Tensor
    """[stop - start]"""
    group: dict[str, Any]
    """The optimizer's parameter group that this belongs to: lr, weight_decay and so on."""
    state: dict[str, Any] = field(default_factory=dict)
    """Filled and kept by the optimizer between steps: tensors [stop - start], and `step` as a tensor without dims."""
    split: bool = False
    """`shape` is a rank's part of a parameter that tensor parallelism splits, not the whole."""


@runtime_checkable
class StepsWhole(Protocol):
    """An optimizer that needs whole parameters."""

    whole_tensors: bool
    param_groups: list[dict[str, Any]]

    def step_sharded(self, shards: Sequence[Shard], group: AxisGroup, part: Hashable = None) -> None:
        """One update of all these shards, in place. Collective over `group`: a rank that holds nothing gives [].

        `part` tells apart sets of shards that are stepped one after the other (the number of a bucket, say); it is the
        same on all ranks, and so are the shards of a part in every step.
        """


@dataclass(frozen=True)
class Span:
    """A shard without its tensors, as other ranks know it."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class ShardMaps:
    """The map of each part, exchanged when it first comes."""

    def __init__(self) -> None:
        self._maps: dict[Hashable, tuple[ShardMap, list[Span]]] = {}

    def of(self, shards: Sequence[Shard], group: AxisGroup, part: Hashable, optimizer: str) -> ShardMap:
        """Collective over the group when the part is new. Raises ConfigError when tensor parallelism splits a shard."""
        held = spans_of(shards)
        if part not in self._maps:
            refuse_split(shards, optimizer)
            self._maps[part] = ShardMap.exchange(shards, group), held
        found, before = self._maps[part]
        assert held == before, f"the shards of part {part} have changed since its first step"
        return found


def shard_maps(optimizer: object) -> ShardMaps:
    """The optimizer's own; a copied optimizer, which torch gives its groups and state alone, starts with none."""
    maps: ShardMaps = vars(optimizer).setdefault("_shard_maps", ShardMaps())
    return maps


class ShardMap:
    """Which rank holds which ranges of which parameter. Made by one exchange, at the first step."""

    def __init__(self, spans: list[list[Span]]) -> None:
        self.spans = spans
        """By rank, in the order in which the rank listed them."""
        self.shapes = {span.name: span.shape for mine in spans for span in mine}
        """Of all parameters of all ranks, in one order everywhere."""
        self.shapes = dict(sorted(self.shapes.items()))
        self.places: dict[str, list[tuple[int, Span]]] = {name: [] for name in self.shapes}
        """(rank, span) of each parameter, by element."""
        for rank, mine in enumerate(spans):
            for span in mine:
                self.places[span.name].append((rank, span))
        for name, places in self.places.items():
            places.sort(key=lambda place: place[1].start)
            self._check_tiles(name, [span for _, span in places])

    @classmethod
    def exchange(cls, shards: Sequence[Shard], group: AxisGroup) -> ShardMap:
        """Collective over the group."""
        return cls(gather_objects(spans_of(shards), group))

    def _check_tiles(self, name: str, spans: list[Span]) -> None:
        shape = self.shapes[name]
        at = 0
        for span in spans:
            assert span.shape == shape, f"{name} is {shape} on one rank and {span.shape} on another"
            assert span.start == at, f"elements {at} to {span.start} of {name} are held by no rank, or by several"
            at = span.stop
        assert at == math.prod(shape), f"the shards of {name} {shape} end at element {at}"


def spans_of(shards: Sequence[Shard]) -> list[Span]:
    return [Span(shard.name, tuple(shard.shape), shard.start, shard.stop) for shard in shards]


def whole_shards(groups: list[dict[str, Any]], state: Any) -> Iterator[Shard]:
    """Parameters with a gradient as shards that are not cut; `state` is the optimizer's own."""
    for at, group in enumerate(groups):
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is not None and parameter.numel():
                tensor = parameter.detach()
                if not tensor.is_contiguous():
                    raise ConfigError(
                        f"parameter {index} of group {at} is not contiguous in memory; this optimizer steps on flat "
                        "views. Make it contiguous: parameter.data = parameter.data.contiguous()."
                    )
                shape = tuple(tensor.shape)
                flat, grad = tensor.view(-1), parameter.grad.reshape(-1)
                yield Shard(f"{at}.{index}", shape, 0, flat.numel(), flat, grad, group, state[parameter])


def not_empty(shards: Sequence[Shard]) -> list[Shard]:
    """Those that hold elements: a rank may list parameters of which it has nothing."""
    return [shard for shard in shards if shard.start < shard.stop]


def refuse_split(shards: Sequence[Shard], optimizer: str) -> None:
    """Raise ConfigError when tensor parallelism splits one of the parameters."""
    split = [shard.name for shard in shards if shard.split]
    if split:
        raise ConfigError(
            f"{optimizer} needs whole parameters, and tensor parallelism splits {len(split)} of them, the first is "
            f"{split[0]}. Train without tensor parallelism (--tensor-model-parallel-size 1; ZeRO stage 3 saves the "
            "same memory), or take an element-wise optimizer such as AdamW."
        )


def count_step(state: dict[str, Any]) -> int:
    """Add one to a shard's step count, and return it."""
    step: Tensor = state.setdefault("step", torch.zeros(()))
    step += 1
    return int(step)


SINGLE = AxisGroup("none", (0,), 0, None)
"""The group of shards that are not cut."""
