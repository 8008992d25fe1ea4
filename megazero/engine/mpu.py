"""A Topology from Megatron's `mpu`: an object that knows this rank's groups, as DeepSpeed takes it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from megazero.base.errors import ConfigError
from megazero.parallel.sharding import ShardSpec, has_spec, split
from megazero.parallel.topology import AxisGroup, Topology
from megazero.parallel.traffic import Traffic


def topology_of(mpu: Any) -> Topology:
    """The axes of get_data_parallel_group, get_model_parallel_group and, where there is one,
    get_pipeline_model_parallel_group. Raises ConfigError for an mpu without groups, or another order of ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Topology.single()
    traffic, rank = Traffic(), dist.get_rank()
    dp = _group("dp", mpu, ("get_data_parallel_group",), rank, traffic)
    tp = _group("tp", mpu, ("get_tensor_model_parallel_group", "get_model_parallel_group"), rank, traffic)
    pp = _group("pp", mpu, ("get_pipeline_model_parallel_group",), rank, traffic, needed=False)
    sizes = {"pp": pp.size, "dp": dp.size, "tp": tp.size}
    place = (pp.rank * dp.size + dp.rank) * tp.size + tp.rank
    if pp.size * dp.size * tp.size != dist.get_world_size() or place != rank:
        raise ConfigError(
            f"mpu has groups of {', '.join(f'{axis} {size}' for axis, size in sizes.items())} in a world of "
            f"{dist.get_world_size()}, with this rank {rank} at place {place} of them: ranks count tensor first, then "
            "data, then pipeline. Make the groups in that order, or leave mpu out."
        )

    def named(axis: str, group: AxisGroup) -> AxisGroup:
        return AxisGroup(axis, group.ranks, group.rank, group.handle, traffic)

    world = AxisGroup("world", tuple(range(dist.get_world_size())), rank, dist.group.WORLD, traffic)
    alone = AxisGroup("cp", (rank,), 0, None, traffic)
    model = tp if pp.size == 1 else _group("model", mpu, ("get_model_parallel_group",), rank, traffic)
    expert_dp = dp if tp.size == 1 else alone
    groups = (pp, dp, alone, tp, named("zero", dp), named("model", model), named("expert_dp", expert_dp))
    experts = AxisGroup("ep", (rank,), 0, None, traffic)
    return Topology(pp=pp.size, dp=dp.size, tp=tp.size, rank=rank, groups=(*groups, experts, world), traffic=traffic)


def give_specs(module: nn.Module, topology: Topology) -> None:
    """Describe the parameters that mpu's layers have split: those marked `tensor_model_parallel` (Megatron) or
    `model_parallel` (DeepSpeed), cut along `partition_dim` (0 where they do not say)."""
    tp = topology.group("tp")
    for name, parameter in module.named_parameters():
        marked = getattr(parameter, "tensor_model_parallel", False) or getattr(parameter, "model_parallel", False)
        if tp.size == 1 or not marked or has_spec(parameter):
            continue
        dim = max(int(getattr(parameter, "partition_dim", 0)), 0)
        shape = tuple(n * (tp.size if d == dim else 1) for d, n in enumerate(parameter.shape))
        box = split(dim, shape, tp.rank, tp.size)
        parameter.shard_spec = ShardSpec(name, shape, (box,), replicas=(topology.rank,))  # type: ignore[attr-defined]


def _group(
    axis: str, mpu: Any, getters: tuple[str, ...], rank: int, traffic: Traffic, *, needed: bool = True
) -> AxisGroup:
    getter = next((getattr(mpu, name) for name in getters if hasattr(mpu, name)), None)
    if getter is None:
        if needed:
            raise ConfigError(f"mpu={mpu!r} has no {getters[0]}(). Give an object with it, or leave mpu out.")
        return AxisGroup(axis, (rank,), 0, None, traffic)
    handle = getter()
    ranks = tuple(dist.get_process_group_ranks(handle))
    return AxisGroup(axis, ranks, ranks.index(rank), handle if len(ranks) > 1 else None, traffic)
