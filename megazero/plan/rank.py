"""All the memory of one rank of the pipeline, and which settings would make a run fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megazero.base.errors import ConfigError
from megazero.config.derive import data_parallel_size
from megazero.config.fields import FIELDS, flag_of, value_of
from megazero.config.layers import Setting, with_settings
from megazero.config.pipeline import micro_batches
from megazero.config.schema import RunConfig
from megazero.config.validate import resolve
from megazero.plan.activations import Activations
from megazero.plan.cut import cut_layers
from megazero.plan.memory import Homes, parameter_bytes, transient_bytes
from megazero.plan.parameters import buckets, parameters, persistent
from megazero.plan.schedule import Table

TableOf = Callable[[RunConfig, int], Table]
"""(resolved configuration, micro-batches) -> what each pp rank does in a step."""


def rank_memory(config: RunConfig, world_size: int, pp_rank: int, table: Table, elements: int | None = None) -> Homes:
    """Bytes by home and component on any rank at this position of the pp axis.

    Args:
        elements: parameters with the padding of buckets, if they have been laid out; else by formula, without.
    """
    stages = [stage for stage in cut_layers(config) if stage.rank == pp_rank]
    dp = data_parallel_size(config, world_size)
    group = dp * config.parallel.context_parallel_size
    listed = parameters(config, stages)
    found = sum(parameter.elements for parameter in listed)
    adam = 1 - sum(p.elements for p in listed if p.unit.startswith("layer")) / max(found, 1)
    homes = parameter_bytes(config, elements or found, group, persistent(config, listed), adam)
    passing = transient_bytes(config, listed, buckets(listed, config.parallel.ddp_bucket_size), group)
    homes.device |= passing.device
    if (
        config.training.autocast != "none"
    ):  # autocast keeps its copies until the end of forward, autograd until backward
        homes.add("none", "16-bit copies", 2 * found)
    homes.cpu |= passing.cpu
    homes.device |= Activations(config).peak(stages, table[pp_rank], micro_batches(config, dp) or 1)
    return homes


def largest_rank(config: RunConfig, world_size: int, table: Table) -> tuple[int, float]:
    """(pp rank that needs most, its bytes)."""
    sums = [sum(rank_memory(config, world_size, rank, table).device.values()) for rank in range(len(table))]
    most = max(sums)
    return sums.index(most), most


def remedies(config: RunConfig, world_size: int, limit: int, table_of: TableOf) -> list[tuple[str, float]]:
    """Changes under which the run fits, the gentlest of each kind first: (flags, bytes of the largest rank)."""
    found = []
    for kind in _changes(config):
        for changes in kind:
            try:
                changed = _changed(config, changes, world_size)
            except ConfigError:  # this layout is impossible
                continue
            batches = micro_batches(changed, data_parallel_size(changed, world_size))
            _, most = largest_rank(changed, world_size, table_of(changed, batches or 1))
            if most <= limit:
                found.append((" ".join(f"{flag_of(key)} {_words(value)}" for key, value in changes.items()), most))
                break
    return found


def _changes(config: RunConfig) -> Iterator[Iterator[dict[str, object]]]:
    """Kinds of changes, each from gentle to strong."""
    parallel, training = config.parallel, config.training
    full: dict[str, object] = {"recompute.recompute_granularity": "full"}
    yield ({"parallel.zero_stage": stage} for stage in range(parallel.zero_stage + 1, 4))
    yield from _offloads(config)
    if config.recompute.recompute_granularity != "full":
        yield iter([_selective("layernorm"), _selective("layernorm", "mlp"), full])
    if training.micro_batch_size > 1:
        sizes = [training.micro_batch_size // 2**n for n in range(1, 8) if training.micro_batch_size % 2**n == 0]
        yield iter([{"training.micro_batch_size": size} for size in sizes])
    for key in ("parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"):
        sizes = [value_of(config, key) * 2**n for n in range(1, 7)]
        yield ({key: size} for size in sizes)
        if config.recompute.recompute_granularity != "full":
            yield ({key: size} | full for size in sizes)


def _offloads(config: RunConfig) -> Iterator[Iterator[dict[str, object]]]:
    """Optimizer to CPU memory, then weights too, with the stage that each needs at least."""
    stage = config.parallel.zero_stage
    if config.offload.offload_optimizer == "none":
        away: dict[str, object] = {"offload.offload_optimizer": "cpu"}
        stages = [{} if least == stage else {"parallel.zero_stage": least} for least in range(max(stage, 1), 4)]
        yield (change | away for change in stages)
    if config.offload.offload_param == "none":
        both: dict[str, object] = {} if stage == 3 else {"parallel.zero_stage": 3}
        if config.offload.offload_optimizer == "none":
            both |= {"offload.offload_optimizer": "cpu"}
        yield iter([both | {"offload.offload_param": "cpu"}])


def _selective(*modules: str) -> dict[str, object]:
    return {"recompute.recompute_granularity": "selective", "recompute.recompute_modules": modules}


def _changed(config: RunConfig, changes: dict[str, object], world_size: int) -> RunConfig:
    """The configuration as it would have been resolved with these changes."""
    derived = {key for key, origin in config.origins.items() if origin.startswith("derived")}
    unset = {key: Setting(FIELDS[key].default, "default") for key in derived}
    new = {key: Setting(value, f"flag {flag_of(key)}") for key, value in changes.items()}
    return resolve(with_settings(config, {**unset, **new}), world_size)


def _words(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
