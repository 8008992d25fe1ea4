"""DeepSpeed's `estimate_zero{2,3}_model_states_mem_needs_all_{live,cold}`: a table of what model states need.

per GPU  what `megazero plan` says of a rank without its activations (plan/memory.py): bf16 weights, fp32 gradients,
         masters, Adam's moments; buckets under way; in stage 3 the units that are whole at a time
per CPU  of a machine, times additional_buffer_factor: what is offloaded, or the fp32 weights while a model is built
         if these are more: all of them in each process, or its slice and what is being built under zero.Init
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megazero.base.errors import ConfigError
from megazero.config.layers import Setting, with_settings
from megazero.config.schema import RunConfig
from megazero.engine.initialize import facts_of
from megazero.engine.units import units_of
from megazero.plan.memory import Homes, parameter_bytes, transient_bytes
from megazero.plan.parameters import BUCKET_ELEMENTS, Parameter, buckets, persistent
from megazero.zero.init import LIVE_ELEMENTS

Listed = Sequence[Parameter]
CHOICES: dict[int, tuple[tuple[str, str], ...]] = {
    2: (("none", "cpu"), ("none", "none")),
    3: (("cpu", "cpu"), ("none", "cpu"), ("none", "none")),
}
"""(home of the weights, of the optimizer) of each row."""


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the table of stage 2 for a model; it may be on meta or made under zero.Init."""
    listed, _ = _of(model)
    _print(2, listed, None, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the table of stage 2 for so many parameters. Raises ConfigError for sizes below 1."""
    _check(total_params=total_params)
    listed = _units(total_params, total_params)
    _print(2, listed, None, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> None:
    """Print the table of stage 3 for a model; its layers are its units, the blocks of a transformer."""
    listed, largest = _of(model)
    _print(3, listed, largest, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> None:
    """Print the table of stage 3 for so many parameters, in layers of `largest_layer_params`.

    Raises ConfigError for sizes below 1, and for a layer that is larger than the model.
    """
    _check(total_params=total_params, largest_layer_params=largest_layer_params)
    if largest_layer_params > total_params:
        raise ConfigError(
            f"largest_layer_params={largest_layer_params:,} is more than total_params={total_params:,}, of which it is "
            "a part. The order is (total_params, largest_layer_params)."
        )
    listed = _units(total_params, largest_layer_params)
    _print(3, listed, largest_layer_params, num_gpus_per_node, num_nodes, additional_buffer_factor)


def _of(model: nn.Module) -> tuple[list[Parameter], int]:
    """A model's parameters by unit, shared ones once, and the elements of its largest unit."""
    facts, units = facts_of(model), units_of(model)
    inside = {f"{unit}.": unit for unit in units}
    listed = [
        Parameter(next((unit for start, unit in inside.items() if name.startswith(start)), ""), parameter.numel())
        for name, parameter in model.named_parameters()
    ]
    if not listed:
        raise ConfigError(
            f"{type(model).__name__} has no parameters, and needs no memory for them. Give another model."
        )
    return listed, facts.largest_layer


def _units(total: int, largest: int) -> list[Parameter]:
    """Units of `largest` elements, and one of the rest, in parameters that fit into buckets."""
    listed = []
    for unit, start in enumerate(range(0, total, largest)):
        elements = min(largest, total - start)
        starts = range(0, elements, BUCKET_ELEMENTS)
        listed += [Parameter(f"layer {unit}", min(BUCKET_ELEMENTS, elements - at)) for at in starts]
    return listed


def _print(stage: int, listed: Listed, largest: int | None, ranks: int, nodes: int, factor: float) -> None:
    _check(num_gpus_per_node=ranks, num_nodes=nodes)
    total = sum(parameter.elements for parameter in listed)
    layer = f", {largest:,} largest layer params" if largest is not None else ""
    print(
        f"Estimated memory needed for params, optim states and gradients for a:\n"
        f"HW: Setup with {nodes} node{'s' * (nodes > 1)}, {ranks} GPU{'s' * (ranks > 1)} per node.\n"
        f"SW: Model with {total:,} total params{layer}. GB are 2^30 bytes.\n"
        f"  per CPU  |  per GPU |   Options"
    )
    for param, optimizer in CHOICES[stage]:
        homes = model_states(stage, optimizer, param, listed, ranks * nodes)
        gpu, offloaded = sum(homes.device.values()), sum(homes.cpu.values()) * ranks
        for init in (True, False) if stage == 3 else (False,):
            cpu = factor * max(offloaded, ranks * building_bytes(total, largest or total, ranks * nodes, init))
            options = f"offload_optimizer={optimizer:4s}"
            if stage == 3:
                options = f"offload_param={param:4s}, {options}, zero_init={int(init)}"
            print(f"  {cpu / 2**30:7.2f}GB | {gpu / 2**30:6.2f}GB | {options.strip()}")


def model_states(stage: int, optimizer: str, param: str, listed: Listed, group: int) -> Homes:
    """Bytes of a rank's model states by component, in mixed precision with Adam, and of the buffers that they need.

    Args:
        optimizer, param: their homes, `none` or `cpu`. listed: the model's parameters. group: ranks.
    """
    values: dict[str, object] = {
        "training.precision": "bf16",
        "parallel.zero_stage": stage,
        "offload.offload_optimizer": optimizer,
        "offload.offload_param": param,
    }
    config = with_settings(RunConfig(), {key: Setting(value, "estimate") for key, value in values.items()})
    homes = parameter_bytes(config, sum(p.elements for p in listed), group, persistent(config, listed))
    passing = transient_bytes(config, listed, buckets(listed, None), group)
    homes.device |= passing.device
    homes.cpu |= passing.cpu
    return homes


def building_bytes(total: int, largest: int, group: int, init: bool) -> float:
    """Most bytes of CPU memory in one process while it builds the model in fp32, under zero.Init or not."""
    return 4 * min(total, total / group + max(largest, LIVE_ELEMENTS)) if init else 4 * total


def _check(**sizes: int) -> None:
    problems = [f"{name}={size}: it is 1 or more." for name, size in sizes.items() if size < 1]
    if problems:
        raise ConfigError(*problems)
