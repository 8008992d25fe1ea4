"""Layers from elsewhere as this rank's part of them: torch's nn.Linear and Hugging Face's Conv1D, over the tp axis.

    nn.Linear [out, in]     column: rows [out/tp, in]        row: columns [out, in/tp]
    Conv1D    [in, out]     column: columns [in, out/tp]     row: rows [in/tp, out]       packed: each of q, k, v so

A layer keeps its parameter objects, with less memory behind them and a ShardSpec on them, so that optimizers made
before know them, and names stay. State dicts hold whole tensors: reading and loading them is collective over tp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megazero.parallel.collectives import all_gather
from megazero.parallel.sharding import Box, ShardSpec, whole
from megazero.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    enter_tensor_parallel,
    leave_tensor_parallel,
)
from megazero.parallel.topology import AxisGroup, Topology

Values = Callable[[nn.Parameter], Tensor]
"""A parameter's whole values, wherever they are."""


@dataclass(frozen=True)
class Cut:
    """How a logical tensor is divided: `packed` matrices beside each other along `dim`, each in equal parts."""

    shape: tuple[int, ...]
    dim: int
    packed: int = 1

    def boxes(self, part: int, parts: int) -> tuple[Box, ...]:
        of_one = self.shape[self.dim] // self.packed
        length = of_one // parts
        return tuple(
            Box(
                tuple(index * of_one + part * length if d == self.dim else 0 for d in range(len(self.shape))),
                tuple(length if d == self.dim else n for d, n in enumerate(self.shape)),
            )
            for index in range(self.packed)
        )

    def whole(self, local: Tensor, group: AxisGroup) -> Tensor:
        """The logical tensor, of every rank's part of it. Collective."""
        gathered = all_gather(local.detach().unsqueeze(0), group, dim=0)
        logical = local.new_empty(self.shape)
        for part, tensor in enumerate(gathered):
            for box, values in zip(self.boxes(part, group.size), tensor.chunk(self.packed), strict=True):
                box.of(logical).copy_(values)
        return logical


class _GatherColumns(torch.autograd.Function):
    """[.., n/tp] -> [.., n]; of its gradient, which is equal on all ranks, each takes its own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size, dim=-1)[ctx.group.rank].contiguous(), None


class _OwnColumns(torch.autograd.Function):
    """[.., n], equal on all ranks -> this rank's [.., n/tp]; the whole gradient goes back to all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return x.chunk(group.size, dim=-1)[group.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad.contiguous(), ctx.group, dim=-1), None


class GatheredColumnLinear(ColumnParallelLinear):
    """A column-parallel linear whose result [.., out] is whole on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.topology is not None
        gathered: Tensor = _GatherColumns.apply(super().forward(x), self.topology.group("tp"))
        return gathered


class SplittingRowLinear(RowParallelLinear):
    """A row-parallel linear of an input [.., in] that is whole on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_OwnColumns.apply(x, self.topology.group("tp")))


class ColumnParallelConv1D(nn.Module):
    """y = x W + b with W's columns split: [.., in] -> [.., packed · out/tp].

    With packed matrices `weight` is this rank's columns of each, one below the other: [packed · in, out/tp].
    """

    def __init__(self, in_features: int, out_features: int, topology: Topology, packed: int = 1) -> None:
        super().__init__()
        self.topology, self.packed = topology, packed
        self.in_features, self.out_features = in_features, out_features // topology.size("tp")  # local sizes
        self.weight: nn.Parameter
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = enter_tensor_parallel(x, self.topology)
        parts = [x @ weight for weight in self.weight.view(self.packed, self.in_features, -1)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias


class RowParallelConv1D(nn.Module):
    """y = x W + b with W's rows split: [.., in/tp] -> [.., out], summed over tp; the bias is whole on each rank."""

    def __init__(self, in_features: int, out_features: int, topology: Topology) -> None:
        super().__init__()
        self.topology = topology
        self.in_features, self.out_features = in_features // topology.size("tp"), out_features  # local sizes
        self.weight: nn.Parameter
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = leave_tensor_parallel(x @ self.weight, self.topology)
        return y if self.bias is None else y + self.bias


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if is_conv1d(module) else (int(columns), int(rows))


def part_of(
    layer: nn.Module, name: str, style: str, topology: Topology, values: Values, *, packed: int = 1
) -> nn.Module:
    """This rank's part of a linear layer.

    Args:
        name: its name in the model, which its parameters' logical names begin with.
        style: colwise, colwise_gather_output, rowwise or rowwise_split_input, as Hugging Face calls them.
        packed: matrices side by side in a column-parallel Conv1D, [in, packed · n].
    """
    into, out = sizes_of(layer)
    column, transposed = style.startswith("colwise"), is_conv1d(layer)
    made: nn.Module
    if transposed:
        made = ColumnParallelConv1D(into, out, topology, packed) if column else RowParallelConv1D(into, out, topology)
    else:
        kinds = {
            "colwise": ColumnParallelLinear,
            "colwise_gather_output": GatheredColumnLinear,
            "rowwise": RowParallelLinear,
            "rowwise_split_input": SplittingRowLinear,
        }
        made = kinds[style](name, into, out, topology, bias=False, init_std=0.0)
    dim = int(column == transposed)
    cuts = {"weight": Cut((into, out) if transposed else (out, into), dim, packed)}
    if layer.bias is not None and column:
        cuts["bias"] = Cut((out,), 0, packed)
    for key, parameter in layer.named_parameters(recurse=False):
        if key in cuts:
            cut_parameter(parameter, f"{name}.{key}", cuts[key], topology, values)
        setattr(made, key, parameter)
    for key, cut in cuts.items():
        made.register_state_dict_post_hook(partial(_give_whole, key, cut, topology.group("tp")))
        made.register_load_state_dict_pre_hook(partial(_take_own, key, cut, topology.group("tp")))
    return made.train(layer.training)


@torch.no_grad()
def cut_parameter(parameter: nn.Parameter, name: str, cut: Cut, topology: Topology, values: Values) -> None:
    """Leave this rank's part of a parameter behind it, and say so on it."""
    tp = topology.group("tp")
    spec = ShardSpec(name, cut.shape, cut.boxes(tp.rank, tp.size), replicas=(tp.ranks[tp.rank],))
    parameter.data = spec.local(values(parameter)).clone(memory_format=torch.contiguous_format)
    parameter.shard_spec = spec  # type: ignore[attr-defined]


def sum_gradients(parameter: nn.Parameter, name: str, topology: Topology) -> None:
    """Say of a parameter, whole on all tp ranks, that its gradients are parts of a sum: each rank has own heads."""
    tp, shape = topology.group("tp"), tuple(parameter.shape)
    parameter.shard_spec = ShardSpec(name, shape, whole(name, shape).boxes, tp.ranks, tp)  # type: ignore[attr-defined]


def _give_whole(
    key: str, cut: Cut, group: AxisGroup, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any
) -> None:
    if isinstance(state.get(prefix + key), Tensor):
        state[prefix + key] = cut.whole(state[prefix + key], group)


def _take_own(
    key: str, cut: Cut, group: AxisGroup, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any
) -> None:
    value = state.get(prefix + key)
    if isinstance(value, Tensor) and tuple(value.shape) == cut.shape:  # torch reports the others
        parts = [box.of(value) for box in cut.boxes(group.rank, group.size)]
        state[prefix + key] = parts[0] if len(parts) == 1 else torch.cat(parts)
