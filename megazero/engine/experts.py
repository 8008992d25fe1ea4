"""Spreading a model's experts over the data-parallel ranks, before its parameters are sharded.

ep = 2 of 4 ranks       rank 0      rank 1      rank 2      rank 3
experts of a layer      0 1         2 3         0 1         2 3
ep, the all-to-all      └─────┬─────┘           └─────┬─────┘
copies, the gradients   0 and 2, 1 and 3; all four for everything else
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from megazero.base.errors import ConfigError
from megazero.engine.prepare import equalize
from megazero.parallel.expert import ExpertList
from megazero.parallel.sharding import whole
from megazero.parallel.topology import Topology
from megazero.zero.init import cut, forget, slice_of


def expert_parallel_size(model: nn.Module, configured: int, ranks: int, other_axes: list[str]) -> int:
    """Over how many ranks the experts of `model` are to be spread, as its layers say or else the configuration.

    Args:
        configured: what the configuration says; 1: nothing.
        ranks: of data parallelism.
        other_axes: what splits the model besides, in words.

    Raises ConfigError where these contradict each other, with every problem at once.
    """
    lists = {name: part for name, part in model.named_modules() if isinstance(part, ExpertList)}
    own: dict[int, str] = {}
    for name, experts in lists.items():
        if experts.ep_size > 1:
            own.setdefault(experts.ep_size, name)
    problems = []
    if len(own) > 1:
        said = ", ".join(f"ep_size={size} ({name})" for size, name in own.items())
        problems.append(f"layers of experts have {said}: all are spread over the same ranks. Give them one ep_size.")
    for size, name in own.items():
        if configured not in (1, size):
            problems.append(
                f"ep_size={size} ({name}) and moe.ep_size {configured} in the configuration: make them equal, or leave "
                "one out."
            )
    size = max([configured, *own])
    if size <= 1:  # what is no size at all is told later, with the configuration's other problems
        return 1
    if not lists:
        problems.append(
            f"moe.ep_size {size} in the configuration, and the model has no experts that could be spread over {size} "
            "ranks. Leave it out, or build the model with megazero.models.moe_layer.MoE (deepspeed.moe.layer.MoE)."
        )
    if other_axes:
        problems.append(
            f"ep_size={size} with {' and '.join(other_axes)}: experts are spread over data-parallel ranks only. Use "
            "one of them."
        )
    elif ranks % size:
        fits = [n for n in range(1, ranks + 1) if ranks % n == 0]
        problems.append(
            f"ep_size={size} with {ranks} rank{'s' * (ranks > 1)}: each expert needs equally many copies. Use an "
            f"ep_size out of {', '.join(map(str, fits))}, or a multiple of {size} ranks."
        )
    for name, experts in lists.items():
        if experts.total % size:
            problems.append(
                f"ep_size={size} with {experts.total} experts ({name}): each rank holds equally many. Use an ep_size "
                f"that divides {experts.total}, or another number of experts."
            )
    if problems:
        raise ConfigError(*problems)
    return size


def spread_experts(
    model: nn.Module, topology: Topology, device: torch.device, *, every_layer: bool
) -> set[nn.Parameter]:
    """Leave each rank its part of the experts, whose parameters from now on say which ranks hold copies. Collective.

    A layer that holds all of its experts has rank 0's values of them, as the rest of the model; one that was built with
    `ep_size` those of the first rank that holds a copy.

    Args:
        every_layer: those too that were built with ep_size=1.

    Returns the parameters that are other ranks' now, without their values. Raises ConfigError for experts that share a
    parameter with something else.
    """
    ep, copies = topology.group("ep"), topology.group("expert_dp")
    if ep.size == 1:
        return set()
    gone: set[nn.Parameter] = set()
    mine: set[nn.Parameter] = set()
    for name, experts in list(model.named_modules()):
        if not isinstance(experts, ExpertList) or not (every_layer or experts.ep_size > 1):
            continue
        _check_alone(model, name, experts)
        if len(experts) == experts.total:
            equalize(experts, topology, device)
        listed = list(experts.parameters())
        gone.update(p for expert in experts.spread(ep) for p in expert.parameters())
        mine.update(p for p in listed if p not in gone)
        for parameter in listed:
            _recut(parameter, topology, keep=parameter not in gone)
    for name, parameter in model.named_parameters():
        if parameter in mine:
            spec = replace(whole(name, tuple(parameter.shape)), replicas=(topology.rank,), copies=copies)
            parameter.shard_spec = spec  # type: ignore[attr-defined]
    return gone


def _check_alone(model: nn.Module, name: str, experts: ExpertList) -> None:
    """Raises ConfigError for a parameter that stands anywhere else than in one expert."""
    prefixes = [f"{path}." for path, part in model.named_modules(remove_duplicate=False) if part is experts]
    holders: dict[nn.Parameter, set[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        inside = next((path.removeprefix(prefix) for prefix in prefixes if path.startswith(prefix)), "")
        holders.setdefault(parameter, set()).add(inside.partition(".")[0])
    shared = [p for p in experts.parameters() if len(holders[p]) > 1]
    if shared:
        raise ConfigError(
            f"{len(shared)} parameters of {name} stand in several experts, or outside them, the first of shape "
            f"{tuple(shared[0].shape)}: experts on different ranks cannot share one. Untie it, or use ep_size=1."
        )


def _recut(parameter: nn.Parameter, topology: Topology, *, keep: bool) -> None:
    """What `zero.Init` has cut over all ranks, over those that keep it. Values of the others are let go."""
    known = slice_of(parameter)
    if known is not None:
        parameter.data = known.whole()
        forget(parameter)
        if keep:
            cut(parameter, topology.group("expert_dp"), known.own.device)
    if not keep:
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
