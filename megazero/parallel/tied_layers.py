"""Layers that share weights, wherever a pipeline's cut puts them.

TiedLayerSpec("embed", …) on stage 0 ─ weight ═ one parameter on a rank ═ weight ─ TiedLayerSpec("embed", …)
                                         ╚═ on other ranks a copy: equal initial values, gradients summed ═╝
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from megazero.base.errors import ConfigError
from megazero.parallel.layer_spec import Layer, MetaLayer, TiedLayerSpec
from megazero.parallel.sharding import ShardSpec, whole
from megazero.parallel.topology import Topology


class TiedLayer(nn.Module):
    """The module of a TiedLayerSpec, called as its forward_fn says."""

    def __init__(self, spec: TiedLayerSpec, module: nn.Module) -> None:
        super().__init__()
        self.spec, self.module = spec, module

    def forward(self, x: Any) -> Any:
        return self.spec.call(self.module, x)

    def share(self, weights: list[nn.Parameter]) -> None:
        """Use these in place of the module's own."""
        replacement = dict(zip(self.spec.weights(self.module), weights, strict=True))
        for module in self.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = replacement.get(parameter, parameter)


def tie(
    metas: Sequence[MetaLayer],
    built: Mapping[int, Layer],
    build: Callable[[int], Layer],
    rank_of: Callable[[int], int],
    topology: Topology,
) -> list[nn.Parameter]:
    """Make the weights of one key one parameter in this rank's layers; the shared ones, in one order on all ranks.

    Args:
        metas: the layers of the whole model.
        built: this rank's, by number.
        build: makes a layer that is not here, for its initial values: the first layer's are everywhere.
        rank_of: the pp rank of a layer.

    Raises ConfigError, on all ranks alike, when weights that are to be shared are missing or not of one shape.
    """
    where: dict[str, list[int]] = defaultdict(list)
    for meta in metas:
        if isinstance(meta.layer, TiedLayerSpec):
            where[meta.layer.key].append(meta.index)
            _check_alike(metas[where[meta.layer.key][0]], meta)
    shared: list[nn.Parameter] = []
    for key, indices in where.items():
        mine = [index for index in indices if index in built]
        if not mine:
            continue
        first = built.get(indices[0]) or build(indices[0])
        assert isinstance(first, TiedLayer)
        weights = first.spec.weights(first.module)
        for attribute, weight in zip(first.spec.attributes, weights, strict=True):
            ranks = sorted({rank_of(index) for index in indices})
            weight.shard_spec = _spec(f"tied.{key}.{attribute}", weight, topology, ranks)  # type: ignore[attr-defined]
        for index in mine:
            layer = built[index]
            assert isinstance(layer, TiedLayer)
            layer.share(weights)
        shared += weights
    return shared


def _check_alike(first: MetaLayer, other: MetaLayer) -> None:
    shapes = []
    for meta in (first, other):
        assert isinstance(meta.layer, TiedLayerSpec) and meta.module is not None
        shapes.append([tuple(weight.shape) for weight in meta.layer.weights(meta.module)])
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"layers {first.index} and {other.index} are tied and their weights have shapes {shapes[0]} and "
            f"{shapes[1]}: shared weights are equal. Change the sizes, or tied_weight_attr."
        )


def _spec(name: str, weight: nn.Parameter, topology: Topology, ranks: list[int]) -> ShardSpec:
    """A parameter that the pp ranks at these positions hold, and their tp ranks."""
    spec = replace(whole(name, tuple(weight.shape)), replicas=topology.group("tp").ranks)
    if len(ranks) == 1:
        return spec
    group = topology.members("pp", tuple(ranks))
    replicas = tuple(rank + other - topology.rank for other in group.ranks for rank in spec.replicas)
    return replace(spec, replicas=replicas, grad_sum=group)
