"""Flat buffers over whole parameters.

A bucket holds parameters of one unit (a block, or what is outside the blocks) in reverse registration order, which is
about the order in which backward fills their gradients. It is padded to equal slices, and rank i of the ZeRO group
owns slice i of EVERY bucket, so memory and reduction time are even by construction and a reduce-scatter writes
straight into the shard.

      values  [ w3 | w2 | w1 |pad]   model dtype; the parameters are views of it
      grads   [ g3 | g2 | g1 |pad]   fp32; gradients accumulate here, whatever type autograd makes
      master  [slice i]              fp32; for an fp32 model it is a view of values
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megazero.parallel.sharding import ShardSpec, spec_of
from megazero.parallel.topology import AxisGroup

# Slices start at multiples of this many elements, so that vectorised kernels and wires see aligned data.
ALIGNMENT = 64
DEFAULT_BUCKET_ELEMENTS = 40_000_000


@dataclass(frozen=True)
class Placed:
    """One parameter's place in a bucket: elements [start, stop) of it."""

    name: str
    parameter: nn.Parameter
    spec: ShardSpec
    start: int
    stop: int

    def overlap(self, start: int, stop: int) -> tuple[int, int] | None:
        """The part of [start, stop) that is this parameter, or None."""
        lo, hi = max(self.start, start), min(self.stop, stop)
        return (lo, hi) if lo < hi else None


class Bucket:
    """One flat buffer, its gradients, and the part of it whose optimizer state lives here."""

    def __init__(self, members: list[tuple[str, nn.Parameter]], group: AxisGroup, *, sharded: bool) -> None:
        self.group = group
        self.placed: list[Placed] = []
        at = 0
        for name, parameter in members:
            self.placed.append(Placed(name, parameter, spec_of(name, parameter), at, at + parameter.numel()))
            at += parameter.numel()
        quantum = group.size * ALIGNMENT
        self.numel = at
        self.length = -(-at // quantum) * quantum
        self.padding = self.length - self.numel
        width = self.length // group.size
        self.slice = (group.rank * width, (group.rank + 1) * width)
        """This rank's slice: it reduces, measures and saves this part."""
        self.owned = self.slice if sharded else (0, self.length)
        """The part whose master and optimizer state live here."""
        self.grad_sum = self.placed[0].spec.grad_sum

    def allocate(self, dtype: torch.dtype, device: torch.device, initial: Callable[[Placed], Tensor]) -> None:
        """Make the buffers, fill values and master from `initial` (fp32, local shape) before any cast, and bind the
        parameters to them."""
        self.values = torch.zeros(self.length, dtype=dtype, device=device)
        self.grads = torch.zeros(self.length, dtype=torch.float32, device=device)
        start, stop = self.owned
        if dtype == torch.float32:
            self.master = self.values[start:stop]
        else:
            self.master = torch.zeros(stop - start, dtype=torch.float32, device=device)
        for place in self.placed:
            uncast = initial(place).reshape(-1)
            self.values[place.start : place.stop].copy_(uncast)
            if (part := place.overlap(start, stop)) is not None and dtype != torch.float32:
                lo, hi = part
                self.master[lo - start : hi - start].copy_(uncast[lo - place.start : hi - place.start])
            place.parameter.data = self.values[place.start : place.stop].view(place.spec.local_shape)

    def cast_master(self) -> None:
        """Write the updated masters into the model's own type."""
        if self.values.dtype != torch.float32:
            self.values[self.owned[0] : self.owned[1]].copy_(self.master)

    def parts(self, start: int, stop: int) -> Iterable[tuple[Placed, int, int]]:
        """The parameters within elements [start, stop), each with its overlap."""
        for place in self.placed:
            if (part := place.overlap(start, stop)) is not None:
                yield place, *part


def make_buckets(
    model: nn.Module, units: list[str], group: AxisGroup, *, sharded: bool, limit: int | None
) -> list[Bucket]:
    """Lay out every parameter of `model` that needs a gradient, in reverse registration order.

    Args:
        units: names of the modules that no bucket crosses.
        limit: largest number of elements in a bucket, unless one parameter is larger; 40 million by default. Smaller
            models get one bucket a unit, of the unit's size.
    """
    limit = limit or DEFAULT_BUCKET_ELEMENTS
    lists: list[list[tuple[str, nn.Parameter]]] = []
    open_lists: dict[tuple[object, ...], tuple[list[tuple[str, nn.Parameter]], int]] = {}
    for name, parameter in reversed(list(model.named_parameters())):
        if not parameter.requires_grad:
            continue
        summed = spec_of(name, parameter).grad_sum
        key = (_unit_of(name, units), summed.ranks if summed else None)
        members, size = open_lists.get(key, ([], limit))
        if size + parameter.numel() > limit:  # start a new bucket
            members, size = [], 0
            lists.append(members)
        members.append((name, parameter))
        open_lists[key] = (members, size + parameter.numel())
    return [Bucket(members, group, sharded=sharded) for members in lists]


def _unit_of(name: str, units: list[str]) -> str:
    """The innermost unit that holds the parameter; "" for what is outside all units."""
    return max((unit for unit in units if name.startswith(f"{unit}.")), key=len, default="")
