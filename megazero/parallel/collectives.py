"""Communication, named for what it does. Every function takes a group and returns its input when the group has one
member.

Slices: a flat tensor of group.size equal slices; rank i owns slice i. On gloo, reduce-scatter is an exchange of slices
followed by a local fp32 sum, and all-gather is an exchange too: gloo's own reduce-scatter is an all-reduce inside and
moves twice the bytes. Every rank sums in the same order (its own slice first, then ascending ranks), so a reduced value
has one set of bits whichever rank later reads it. What a step sends is counted in the group's `traffic`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megazero.parallel.topology import AxisGroup
from megazero.parallel.traffic import Operation

Reduction = Literal["sum", "max", "min"]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Pending:
    """Communication under way. `wait` ends it, once; until then its buffers are not to be touched.

    One that is dropped ends too (an engine goes while its parameters are still on their way): on gloo a message whose
    receiver is gone stays in the connection, and nothing that is sent after it arrives.
    """

    def __init__(self, works: list[dist.Work], finish: Callable[[], None] | None = None) -> None:
        self._works = works
        self._finish = finish

    def wait(self) -> None:
        works, finish = self._works, self._finish
        self._works, self._finish = [], None
        for work in works:
            work.wait()
        if finish is not None:
            finish()

    def __del__(self) -> None:
        failing = sys.is_finalizing() or sys.exc_info()[0] is not None  # the other side may never come
        if not self._works or failing or not dist.is_initialized():
            return
        with contextlib.suppress(RuntimeError):  # the group or its other side is gone, and the connection with it
            self.wait()


def all_reduce(tensor: Tensor, group: AxisGroup, op: Reduction = "sum") -> Tensor:
    """Reduce over the group, in place, and return the tensor."""
    if group.size > 1:
        _count(group, "all-reduce", tensor.numel(), tensor.dtype)
        dist.all_reduce(tensor, _OPS[op], group=group.handle)
    return tensor


def all_gather(tensor: Tensor, group: AxisGroup, dim: int) -> Tensor:
    """The group's tensors of equal shape, concatenated along `dim` in rank order."""
    if group.size == 1:
        return tensor
    _count(group, "all-gather", tensor.numel() * group.size, tensor.dtype)
    parts = [torch.empty_like(tensor) for _ in range(group.size)]
    dist.all_gather(parts, tensor.contiguous(), group=group.handle)
    return torch.cat(parts, dim=dim)


def reduce_scatter(tensor: Tensor, group: AxisGroup, dim: int) -> Tensor:
    """Sum over the group, of which this rank keeps its part along `dim`: [.., n, ..] -> [.., n / size, ..]."""
    if group.size == 1:
        return tensor
    parts = tensor.unflatten(dim, (group.size, -1)).movedim(dim, 0)  # [size, .., n / size, ..]
    flat = parts.contiguous().view(-1)
    if flat.data_ptr() == tensor.data_ptr():
        flat = flat.clone()  # the input is not ours to change
    reduce_scatter_slices(flat, group).wait()
    own: Tensor = flat.chunk(group.size)[group.rank].clone()  # a view would keep the whole of flat alive
    return own.view(parts.shape[1:])


def broadcast(tensor: Tensor, group: AxisGroup, source: int) -> Tensor:
    """The tensor of the group's member `source`, in place on the others."""
    if group.size > 1:
        _count(group, "broadcast", tensor.numel(), tensor.dtype)
        dist.broadcast(tensor, group.ranks[source], group=group.handle)
    return tensor


def all_to_all(tensor: Tensor, group: AxisGroup) -> Tensor:
    """Part i along dim 0 of [size, ..] goes to rank i; the result's part i came from rank i."""
    if group.size == 1:
        return tensor
    _count(group, "all-to-all", tensor.numel(), tensor.dtype)
    sent = tensor.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group.handle)
    return received


def send(tensor: Tensor, group: AxisGroup, target: int) -> Pending:
    """Start sending to the group's member `target`, which calls `receive`. The tensor must live until the end."""
    _count(group, "send", tensor.numel(), tensor.dtype)
    work = dist.isend(tensor, group.ranks[target], group=group.handle)
    assert work is not None, "this rank is in the group"
    return Pending([work])


def receive(tensor: Tensor, group: AxisGroup, source: int) -> Tensor:
    """What the group's member `source` sends, written into `tensor`."""
    dist.recv(tensor, group.ranks[source], group=group.handle)
    return tensor


def pass_on(tensor: Tensor, group: AxisGroup) -> tuple[Tensor, Pending]:
    """Send to the next rank and receive the like of it from the previous one, round the group of two or more."""
    _count(group, "send", tensor.numel(), tensor.dtype)
    received = torch.empty_like(tensor)
    following, before = group.ranks[(group.rank + 1) % group.size], group.ranks[group.rank - 1]
    ops = [
        dist.P2POp(dist.irecv, received, before, group.handle),
        dist.P2POp(dist.isend, tensor, following, group.handle),
    ]
    return received, Pending(dist.batch_isend_irecv(ops))


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


def reduce_scatter_slices(
    flat: Tensor, group: AxisGroup, wire_dtype: torch.dtype | None = None, padding: int = 0
) -> Pending:
    """Sum `flat` over the group into this rank's own slice of it; the other slices are undefined afterwards.

    `wire_dtype` is the type sent (default: flat's). On gloo the sum is done in flat's own type whatever was sent; NCCL
    sums in the type it sends. The last `padding` elements hold nothing, which only the count of bytes asks for.
    """
    if group.size == 1:
        return Pending([])
    slices = flat.chunk(group.size)
    own = slices[group.rank]
    wire = wire_dtype or flat.dtype
    _count(group, "reduce-scatter", flat.numel(), wire, padding)
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


def all_gather_slices(flat: Tensor, group: AxisGroup, padding: int = 0) -> Pending:
    """Fill `flat` with every rank's own slice of it; for `padding` see reduce_scatter_slices."""
    if group.size == 1:
        return Pending([])
    _count(group, "all-gather", flat.numel(), flat.dtype, padding)
    slices = flat.chunk(group.size)
    own = slices[group.rank]
    if dist.get_backend(group.handle) != "gloo":
        return Pending([dist.all_gather_into_tensor(flat, own, group=group.handle, async_op=True)])
    incoming = {peer: part for peer, part in enumerate(slices) if peer != group.rank}
    return Pending(_exchange(group, [own] * group.size, incoming))


def count_sends(stage: Any, group: AxisGroup) -> None:
    """Count what a stage of torch.distributed.pipelining sends, which it does by itself, for its whole life.

    Its schedules ask the stage for each send; how they then start it differs between them and between torch versions.
    """
    for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
        setattr(stage, name, _counted(getattr(stage, name), group))


def _counted(send_ops: Callable[[int], list[dist.P2POp]], group: AxisGroup) -> Callable[[int], list[dist.P2POp]]:
    def counted(chunk: int) -> list[dist.P2POp]:
        ops = send_ops(chunk)
        for op in ops:
            _count(group, "send", op.tensor.numel(), op.tensor.dtype)
        return ops

    return counted


def _count(group: AxisGroup, operation: Operation, elements: int, dtype: torch.dtype, padding: int = 0) -> None:
    """Count one call on a whole tensor of so many elements."""
    group.traffic.add(group.axis, operation, group.size, elements=elements, itemsize=dtype.itemsize, padding=padding)


def _exchange(group: AxisGroup, outgoing: list[Tensor], incoming: dict[int, Tensor]) -> list[dist.Work]:
    """Send outgoing[peer] to each peer while receiving incoming[peer]; receives are posted first."""
    peers = [(group.rank + step) % group.size for step in range(1, group.size)]  # no two ranks start on the same peer
    ops = [dist.P2POp(dist.irecv, incoming[peer], group.ranks[peer], group.handle) for peer in reversed(peers)]
    ops += [dist.P2POp(dist.isend, outgoing[peer], group.ranks[peer], group.handle) for peer in peers]
    return dist.batch_isend_irecv(ops)


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
