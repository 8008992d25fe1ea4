"""A run planned in one process, whatever its size: rank r's part built on meta over torch's fake process group.

resolve ─► cut ─► schedule ─► parts on meta, buckets laid out ─► bytes, communication, timeline ─► fits?

Parameters are counted in what was built; activations and communication are `plan`'s formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from megazero.base.launch import Launch
from megazero.config.layers import Setting, with_settings
from megazero.config.layout import parse_bytes
from megazero.config.pipeline import micro_batches
from megazero.config.schema import RunConfig
from megazero.config.validate import resolve
from megazero.models.block import Block
from megazero.models.gpt import Part, build_parts
from megazero.parallel.schedule_table import schedule_table
from megazero.parallel.topology import Topology
from megazero.plan.communication import communication
from megazero.plan.cut import cut_layers, describe_cut
from megazero.plan.flops import flops_per_token, parameter_count
from megazero.plan.memory import Homes
from megazero.plan.parameters import parameters
from megazero.plan.rank import largest_rank, rank_memory, remedies
from megazero.plan.schedule import UNIT_TIMES, Action, Table, bubble_formula, draw, replay
from megazero.zero.adopt import with_leaves
from megazero.zero.buckets import Bucket, make_buckets
from megazero.zero.stages import STAGES

_GIB = 2**30


def dry_run(config: RunConfig) -> int:
    """Print the plan of a run and return 0 if it fits the device's memory, 1 if it does not. One process speaks.

    Raises ConfigError for settings that cannot work on that many ranks.
    """
    launch = Launch.from_environment()
    if launch.rank != 0:
        return 0
    world_size = config.dry_run.world_size or launch.world_size
    config = resolve(_as_on_gpus(config), world_size)
    with _fake(config, world_size) as topology:
        return _report(config, topology)


def _as_on_gpus(config: RunConfig) -> RunConfig:
    """Settle what a run takes from its machine."""
    if config.training.precision == "auto":
        config = with_settings(config, {"training.precision": Setting("bf16", "derived: auto on GPUs")})
    return config


@contextmanager
def _fake(config: RunConfig, world_size: int) -> Iterator[Topology]:
    parallel = config.parallel
    topology = Topology.fake(
        world_size,
        config.dry_run.rank,
        pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size,
        tp=parallel.tensor_model_parallel_size,
        ep=parallel.expert_model_parallel_size,
        sequence_parallel=bool(parallel.sequence_parallel),
        cp_comm=parallel.cp_comm_type,
    )
    try:
        yield topology
    finally:
        dist.destroy_process_group()


def _report(config: RunConfig, topology: Topology) -> int:
    """Say everything; the exit status."""
    batches = micro_batches(config, topology.size("dp"))
    assert batches is not None, "a resolved batch divides"
    table = table_of(config, batches)
    buckets = lay_out(config, topology)
    limit = parse_bytes(config.dry_run.device_memory)
    print("\n".join([*_layout(config, topology, batches), ""]))
    if len(table) > 1:
        print("\n".join([describe_cut(cut_layers(config)), "", *_schedule(config, table, batches), ""]))
    print("\n".join([*_parameters(config, topology, buckets), ""]))
    print("\n".join([*_communication(config, topology, batches), ""]))
    elements = sum(bucket.length for bucket in buckets)
    pp_rank = topology.group("pp").rank
    homes = rank_memory(config, topology.world_size, pp_rank, table, elements)
    print("\n".join([f"memory of rank {topology.rank}", *_bytes(homes.device), *_elsewhere(homes)]))
    return _verdict(config, topology, table, limit, sum(homes.device.values()))


def table_of(config: RunConfig, batches: int) -> Table:
    """What each pp rank does in a step of the resolved configuration."""
    parallel = config.parallel
    assert parallel.pipeline_schedule is not None and parallel.num_virtual_stages_per_pipeline_rank is not None
    pp, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if pp == 1:  # forward and backward by turns
        return [[action for index in range(batches) for action in (Action(0, "F", index), Action(0, "B", index))]]
    return schedule_table(parallel.pipeline_schedule, pp, virtual, batches)


def lay_out(config: RunConfig, topology: Topology) -> list[Bucket]:
    """This rank's parameters, on meta, in the buckets that ZeRO would allocate."""
    mine = [stage for stage in cut_layers(config) if stage.rank == topology.group("pp").rank]
    parts = [Part(stage.layers, stage.has_embedding, stage.has_loss) for stage in mine]
    module, group = nn.ModuleList(build_parts(config.model, topology, parts)), topology.group("zero")
    blocks = [name for name, block in module.named_modules() if isinstance(block, Block)]
    return make_buckets(
        module,
        with_leaves(module, blocks, group.size),
        group,
        sharded=STAGES[config.parallel.zero_stage].optimizer_sharded,
        limit=config.parallel.ddp_bucket_size,
    )


def _layout(config: RunConfig, topology: Topology, batches: int) -> list[str]:
    training, place = config.training, ", ".join(f"{axis} {at}" for axis, at in topology.coord.items())
    sizes = " · ".join(f"{axis} {size}" for axis, size in topology.sizes.items() if size > 1) or "one rank"
    batch, length = training.global_batch_size or 0, config.data.seq_length
    flops = flops_per_token(config.model, length) * batch * length
    return [
        f"dry run of {topology.world_size} ranks: {sizes}; rank {topology.rank} is {place}",
        f"  model     {parameter_count(config.model):,} parameters, {training.precision}, "
        f"ZeRO {config.parallel.zero_stage}",
        f"  a step    {batch:,} samples of {length:,} tokens = {batch * length:,} tokens: {batches} micro-batches of "
        f"{training.micro_batch_size} on each of {topology.size('dp')} replicas",
        f"  compute   {flops:.3e} model FLOPs a step, {flops / topology.world_size:.3e} on each rank",
    ]


def _schedule(config: RunConfig, table: Table, batches: int) -> list[str]:
    """The timeline for equal stages, and the bubble with this cut's own times."""
    parallel = config.parallel
    name, virtual = str(parallel.pipeline_schedule), parallel.num_virtual_stages_per_pipeline_rank or 1
    even = replay(table, UNIT_TIMES)
    flops = {stage.stage: stage.flops for stage in cut_layers(config)}
    times = {action: flops[action.stage] * UNIT_TIMES[action.kind] for row in table for action in row}
    formula = bubble_formula(name, len(table), batches, virtual)
    return [
        f"schedule: {name}, idle {even.bubble:.1%} of the busy time with equal stages (formula {formula:.1%}), "
        f"{replay(table, times).bubble:.1%} with this cut's FLOPs",
        "  digits: micro-batches forward; underlined: backward; overlined: its weight half; dots: idle",
        *(f"  {line}" for line in draw(even, 118).splitlines()),
    ]


def _parameters(config: RunConfig, topology: Topology, buckets: list[Bucket]) -> list[str]:
    elements, padding = sum(bucket.numel for bucket in buckets), sum(bucket.padding for bucket in buckets)
    return [
        f"parameters of rank {topology.rank}: {elements:,} in {len(buckets)} buckets, {padding:,} elements of padding",
    ]


def _communication(config: RunConfig, topology: Topology, batches: int) -> list[str]:
    cut, pp_rank = cut_layers(config), topology.group("pp").rank
    listed = parameters(config, [stage for stage in cut if stage.rank == pp_rank])
    volumes = communication(config, cut, pp_rank, listed, topology.size("zero"), batches)
    lines = [
        f"  {volume.axis:<5} {volume.operation:<15} {volume.elements:>20,.0f} elements {volume.bytes / 1e9:>12,.3f} GB"
        for volume in volumes
    ]
    return [f"communication of rank {topology.rank} in a step", *(lines or ["  none"])]


def _bytes(components: dict[str, float]) -> list[str]:
    lines = [f"  {name:<19} {count / _GIB:>9,.3f} GiB" for name, count in components.items()]
    return [*lines, f"  {'together':<19} {sum(components.values()) / _GIB:>9,.3f} GiB"]


def _elsewhere(homes: Homes) -> list[str]:
    """What is offloaded."""
    lines = []
    for title, components in (("CPU memory", homes.cpu), ("files", homes.nvme)):
        if components:
            lines += [f"{title} of this rank", *_bytes(components)]
    return lines


def _verdict(config: RunConfig, topology: Topology, table: Table, limit: int, own: float) -> int:
    """Compare the largest rank with the device."""
    pp_rank, most = largest_rank(config, topology.world_size, table)
    most = max(most, own)
    where, size = "", config.dry_run.device_memory
    if len(table) > 1:
        where = f" on rank {pp_rank * topology.world_size // len(table)} (pp {pp_rank}), which needs most"
    if most <= limit:
        print(f"fits: {most / _GIB:,.2f} GiB{where}; --device-memory {size}")
        return 0
    print(f"does not fit: {most / _GIB:,.2f} GiB{where}; {(most - limit) / _GIB:,.2f} GiB over --device-memory {size}")
    found = remedies(config, topology.world_size, limit, table_of)
    for flags, needed in found:
        print(f"  would fit with {flags}: {needed / _GIB:,.2f} GiB")
    if not found:
        print(
            "  no change of ZeRO, offload, recomputation, micro-batch size, tp or pp helps; use more or larger devices"
        )
    return 1
