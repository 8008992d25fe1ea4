"""`deepspeed.checkpointing`: one setting for a whole process of how checkpoints keep their inputs.

    configure(mpu, deepspeed_config="ds_config.json")     # or deepspeed.initialize does it, from its config
    y = checkpoint(function, x)

DeepSpeed's interface is global, so this is; megazero.checkpointing.checkpoint takes the same as arguments.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megazero.base.errors import ConfigError
from megazero.checkpointing import SavedInputs
from megazero.checkpointing import checkpoint as own_checkpoint
from megazero.config.deepspeed_source import Source, read_tree
from megazero.parallel.topology import AxisGroup, Topology

SECTION = "activation_checkpointing"


@dataclass
class Settings:
    """What `configure` sets, under the names of the section in ds_config.json."""

    partition_activations: bool = False
    cpu_checkpointing: bool = False
    contiguous_memory_optimization: bool = False
    number_checkpoints: int | None = None
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False


class State:
    """The process's one setting."""

    configured = False
    """By the script itself, which wins over what an engine's configuration says."""
    saved: SavedInputs | None = None
    synchronize = False


def configure(
    mpu_: Any = None,
    deepspeed_config: Source | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """How `checkpoint` keeps its inputs from now on.

    Args:
        mpu_: a megazero Topology, or an object with Megatron's get_model_parallel_group(): the ranks over which inputs
            are equal, for partition_activations.
        deepspeed_config: where the section activation_checkpointing is; the other arguments win over it.

    Raises ConfigError for unknown keys and for settings that don't go together.
    """
    given = {
        "partition_activations": partition_activations,
        "contiguous_memory_optimization": contiguous_checkpointing,
        "number_checkpoints": num_checkpoints,
        "cpu_checkpointing": checkpoint_in_cpu,
        "synchronize_checkpoint_boundary": synchronize,
        "profile": profile,
    }
    section = section_of(deepspeed_config) if deepspeed_config is not None else {}
    apply(section | {key: value for key, value in given.items() if value is not None}, mpu_)
    State.configured = True


def apply(section: Mapping[str, Any], mpu: Any) -> None:
    """What `configure` does, from the keys of the section."""
    for key in section:
        if key not in Settings.__dataclass_fields__:
            near = difflib.get_close_matches(key, Settings.__dataclass_fields__, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{SECTION}.{key}: there is no such key. Did you mean {near}?")
    settings = Settings(**section)
    if settings.profile:
        raise ConfigError(
            f"{SECTION}.profile=true: checkpoints have no timers of their own. Leave it out; wall_clock_breakdown "
            "times forward and backward, and torch.profiler shows what is computed again."
        )
    if settings.contiguous_memory_optimization and not settings.number_checkpoints:
        raise ConfigError(
            f"{SECTION}.contiguous_memory_optimization=true without number_checkpoints: the buffer has a place for "
            "each checkpoint of a micro-batch. Give number_checkpoints, the number of layers that you checkpoint."
        )
    slots = settings.number_checkpoints if settings.contiguous_memory_optimization else 0
    group = _model_parallel(mpu) if settings.partition_activations else None
    State.saved = SavedInputs(partition=group, offload=settings.cpu_checkpointing, slots=slots or 0)
    State.synchronize = settings.synchronize_checkpoint_boundary


def is_configured() -> bool:
    return State.configured


def reset() -> None:
    """Let go of buffers; the setting stays."""
    if State.saved is not None:
        State.saved = SavedInputs(partition=State.saved.group, offload=State.saved.offload, slots=State.saved.slots)


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, computed again in backward; its inputs kept as configured."""
    _boundary()
    result = own_checkpoint(function, *args, saved=State.saved)
    _boundary()
    return result


def _boundary() -> None:
    if State.synchronize and torch.cuda.is_available():
        torch.cuda.synchronize()


def section_of(source: Source) -> dict[str, Any]:
    """The section of a configuration; {} without one. Raises ConfigError for what is no configuration."""
    return dict(read_tree(source)[0].get(SECTION) or {})


def _model_parallel(mpu: Any) -> AxisGroup | None:
    """The ranks with equal inputs; None when there is one."""
    if mpu is None:
        return None
    if isinstance(mpu, Topology):
        return mpu.group("tp")
    handle = mpu.get_model_parallel_group()
    ranks = tuple(dist.get_process_group_ranks(handle))
    return AxisGroup("tp", ranks, dist.get_rank(handle), handle)
