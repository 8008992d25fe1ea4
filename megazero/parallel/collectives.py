"""Communication, named for what it does. Every function takes a group and returns its input when the group has one
member.

Slices: a flat tensor of group.size equal slices; rank i owns slice i. On gloo, reduce-scatter is an exchange of slices
followed by a local fp32 sum, and all-gather is an exchange too: gloo's own reduce-scatter is an all-reduce inside and
moves twice the bytes. Every rank sums in the same order (its own slice first, then ascending ranks), so a reduced value
has one set of bits whichever rank later reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megazero.parallel.topology import AxisGroup

Reduction = Literal["sum", "max", "min"]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Pending:
    """Communication under way. `wait` ends it, once; until then its buffers are not to be touched."""

    def __init__(self, works: list[dist.Work], finish: Callable[[], None] | None = None) -> None:
        self._works = works
        self._finish = finish

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        if self._finish is not None:
            self._finish()
        self._works, self._finish = [], None


def all_reduce(tensor: Tensor, group: AxisGroup, op: Reduction = "sum") -> Tensor:
    """Reduce over the group, in place, and return the tensor."""
    if group.size > 1:
        dist.all_reduce(tensor, _OPS[op], group=group.handle)
    return tensor


def all_gather(tensor: Tensor, group: AxisGroup, dim: int) -> Tensor:
    """The group's tensors of equal shape, concatenated along `dim` in rank order."""
    if group.size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size)]
    dist.all_gather(parts, tensor.contiguous(), group=group.handle)
    return torch.cat(parts, dim=dim)


def gather_objects(value: Any, group: AxisGroup) -> list[Any]:
    """Every rank's value, in rank order. For small things at start-up and in errors, never in the step."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values


def barrier(group: AxisGroup) -> None:
    """Wait until every rank of the group is here."""
    if group.size > 1:
        dist.barrier(group=group.handle)


def reduce_scatter_slices(flat: Tensor, group: AxisGroup, wire_dtype: torch.dtype | None = None) -> Pending:
    """Sum `flat` over the group into this rank's own slice of it; the other slices are undefined afterwards.

    `wire_dtype` is the type sent (default: flat's). On gloo the sum is done in flat's own type whatever was sent; NCCL
    sums in the type it sends.
    """
    if group.size == 1:
        return Pending([])
    slices = flat.chunk(group.size)
    own = slices[group.rank]
    wire = wire_dtype or flat.dtype
    if dist.get_backend(group.handle) != "gloo":
        sent = flat.to(wire)
        received = own if wire == flat.dtype else torch.empty_like(own, dtype=wire)
        work = dist.reduce_scatter_tensor(received, sent, group=group.handle, async_op=True)
        return Pending([work], None if received is own else lambda: _copy(own, received))
    outgoing = [part.to(wire) for part in slices]
    incoming = {peer: torch.empty_like(own, dtype=wire) for peer in range(group.size) if peer != group.rank}

    def add_up() -> None:
        for peer in sorted(incoming):
            own.add_(incoming[peer])

    return Pending(_exchange(group, outgoing, incoming), add_up)


def all_gather_slices(flat: Tensor, group: AxisGroup) -> Pending:
    """Fill `flat` with every rank's own slice of it."""
    if group.size == 1:
        return Pending([])
    slices = flat.chunk(group.size)
    own = slices[group.rank]
    if dist.get_backend(group.handle) != "gloo":
        return Pending([dist.all_gather_into_tensor(flat, own, group=group.handle, async_op=True)])
    incoming = {peer: part for peer, part in enumerate(slices) if peer != group.rank}
    return Pending(_exchange(group, [own] * group.size, incoming))


def _exchange(group: AxisGroup, outgoing: list[Tensor], incoming: dict[int, Tensor]) -> list[dist.Work]:
    """Send outgoing[peer] to each peer while receiving incoming[peer]; receives are posted first."""
    peers = [(group.rank + step) % group.size for step in range(1, group.size)]  # no two ranks start on the same peer
    ops = [dist.P2POp(dist.irecv, incoming[peer], group.ranks[peer], group.handle) for peer in reversed(peers)]
    ops += [dist.P2POp(dist.isend, outgoing[peer], group.ranks[peer], group.handle) for peer in peers]
    return dist.batch_isend_irecv(ops)


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
