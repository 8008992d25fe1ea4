"""Tensor parallelism: linear layers and the token embedding split over the tp axis (Shoeybi et al., arXiv 1909.08053).

    x ─ enter ─ ColumnParallelLinear ─ f ─ RowParallelLinear ─ leave ─ y
       [b,s,h]      [b,s,ffn/tp]             [b,s,h] partial    [b,s,h]

    enter: identity forward, all-reduce backward        leave: all-reduce forward, identity backward

Communication Functions hold no weights, so a backward that is run in two halves pays no collective twice. The layers
are not subclasses of nn.Linear on purpose: a library that treats them as such would train wrong adapters silently.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megazero.parallel.collectives import all_gather, all_reduce, reduce_scatter
from megazero.parallel.sharding import ShardSpec, spec_of, split, whole
from megazero.parallel.topology import AxisGroup, Topology

SEQUENCE = 1  # the dim of [b, s, h] that sequence parallelism splits


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.contiguous(), ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup) -> Tensor:
        return all_reduce(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group, dim=SEQUENCE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.group, dim=SEQUENCE), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group, dim=SEQUENCE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.group, dim=SEQUENCE), None


def enter_tensor_parallel(x: Tensor, topology: Topology) -> Tensor:
    """Into a region where each tp rank computes a part: the gradients of `x` that come back are summed over tp.

    With sequence parallelism `x` [b, s/tp, h] is gathered to [b, s, h], and its gradient scattered again.
    """
    group = topology.group("tp")
    if group.size == 1:
        return x
    entered: Tensor = (_GatherSequence if topology.sequence_parallel else _Enter).apply(x, group)
    return entered


def leave_tensor_parallel(x: Tensor, topology: Topology) -> Tensor:
    """Out of such a region: sums the ranks' partial results, in the memory of `x`, which must be the result of an
    operation that does not keep it for its backward (a matrix product does not).

    With sequence parallelism each rank keeps its part of the sequence, [b, s, h] -> [b, s/tp, h].
    """
    group = topology.group("tp")
    if group.size == 1:
        return x
    left: Tensor = (_ScatterSequence if topology.sequence_parallel else _Leave).apply(x, group)
    return left


def own_part_of_sequence(x: Tensor, topology: Topology) -> Tensor:
    """What of x [b, s, ..] belongs to this rank's residual stream: [b, s/tp, ..] with sequence parallelism."""
    if not topology.sequence_parallel:
        return x
    group = topology.group("tp")
    return x.chunk(group.size, dim=SEQUENCE)[group.rank]


def gather_columns(x: Tensor, group: AxisGroup) -> Tensor:
    """[..., n/tp] on each rank -> [..., n] on all. For results that are read, not differentiated."""
    return all_gather(x.detach(), group, dim=-1) if group.size > 1 else x


def parameter(spec: ShardSpec) -> nn.Parameter:
    """An unallocated parameter (on meta) of the spec's local shape; it gets memory and values when ZeRO takes it."""
    created = nn.Parameter(torch.empty(spec.local_shape, device="meta"))
    created.shard_spec = spec  # type: ignore[attr-defined]  # read back by sharding.spec_of
    return created


def replicated(
    name: str, shape: tuple[int, ...], topology: Topology, *, partial: bool = False, **init: Any
) -> nn.Parameter:
    """A parameter that every tp rank holds whole.

    Its gradients are equal on all of them, unless it works on the residual stream under sequence parallelism, or is
    `partial`: each tp rank feeds it other data (its own heads, say). Then they are summed over tp.
    """
    tp = topology.group("tp")
    grad_sum = tp if tp.size > 1 and (partial or topology.sequence_parallel) else None
    return parameter(ShardSpec(name, shape, whole(name, shape).boxes, tp.ranks, grad_sum, **init))


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with W's rows (the output features) split over tp: [.., in] -> [.., out/tp].

    Args:
        name: logical name of the module; parameters are `{name}.weight` [out, in] and `{name}.bias` [out].
        enter: false when the caller has already passed `x` through `enter_tensor_parallel`, as attention and gated MLPs
            do once for all the projections that read the same input.
        copies: neighbouring tp ranks that hold the same rows (kv heads fewer than tp); their gradients are summed.

    Raises AssertionError when out is not a multiple of tp / copies (configs are checked before).
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        topology: Topology,
        *,
        bias: bool,
        init_std: float,
        enter: bool = True,
        copies: int = 1,
    ) -> None:
        super().__init__()
        self.topology = topology if enter else None
        tp = topology.group("tp")
        same = topology.subgroup("tp", copies)
        part, parts = tp.rank // copies, tp.size // copies
        grad_sum = same if copies > 1 else None
        shape = (out_features, in_features)
        box = split(0, shape, part, parts)
        self.weight = parameter(ShardSpec(f"{name}.weight", shape, (box,), same.ranks, grad_sum, init_std))
        self.bias: nn.Parameter | None = None
        if bias:
            box = split(0, (out_features,), part, parts)
            self.bias = parameter(ShardSpec(f"{name}.bias", (out_features,), (box,), same.ranks, grad_sum))
        self.in_features, self.out_features = in_features, out_features // parts  # local sizes

    def forward(self, x: Tensor) -> Tensor:
        if self.topology is not None:
            x = enter_tensor_parallel(x, self.topology)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with W's columns (the input features) split over tp: [.., in/tp] -> [.., out], summed over tp.

    The bias is whole on each rank and added after the sum. Parameters: `{name}.weight` [out, in], `{name}.bias` [out].
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, topology: Topology, *, bias: bool, init_std: float
    ) -> None:
        super().__init__()
        self.topology, tp = topology, topology.group("tp")
        shape = (out_features, in_features)
        box = split(1, shape, tp.rank, tp.size)
        replicas = (tp.ranks[tp.rank],)
        self.weight = parameter(ShardSpec(f"{name}.weight", shape, (box,), replicas=replicas, init_std=init_std))
        self.bias = replicated(f"{name}.bias", (out_features,), topology) if bias else None
        self.in_features, self.out_features = in_features // tp.size, out_features  # local sizes

    def forward(self, x: Tensor) -> Tensor:
        y = leave_tensor_parallel(F.linear(x, self.weight), self.topology)
        return y if self.bias is None else y + self.bias


def vocabulary_rows(
    name: str, rows: int, width: int, topology: Topology, *, init_std: float, copies: AxisGroup | None = None
) -> nn.Parameter:
    """This tp rank's rows of a [rows, width] matrix over the vocabulary.

    `copies`: ranks that hold the same rows (the ends of the pipeline, with tied embeddings); gradients are summed.
    """
    tp, shape = topology.group("tp"), (rows, width)
    box = split(0, shape, tp.rank, tp.size)
    shared = copies is not None and copies.size > 1
    replicas = copies.ranks if copies is not None and shared else (tp.ranks[tp.rank],)
    return parameter(ShardSpec(name, shape, (box,), replicas, copies if shared else None, init_std))


class VocabParallelEmbedding(nn.Module):
    """Token embedding with its rows split over tp: ids [b, s] -> [b, s, h] (with sequence
    parallelism this rank's part of it, [b, s/tp, h]).

    `rows` is the padded vocabulary; padding never depends on tp. Ids that another rank holds contribute zero here and
    the sum over tp completes them.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        width: int,
        topology: Topology,
        *,
        init_std: float,
        copies: AxisGroup | None = None,
    ) -> None:
        super().__init__()
        self.topology = topology
        self.weight = vocabulary_rows(f"{name}.weight", rows, width, topology, init_std=init_std, copies=copies)
        self.first, self.rows = spec_of("", self.weight).boxes[0].offset[0], self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        if self.topology.size("tp") == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return leave_tensor_parallel(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.topology)
