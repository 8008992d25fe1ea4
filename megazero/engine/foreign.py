"""Tensor parallelism for modules that know nothing of it (Hugging Face's): the one place where it enters.

    module ─► its plan ─► the same values on all tp ranks ─► linears become this rank's parts, under their own names

Norms, embeddings and what no plan names stay whole; their gradients are equal on all tp ranks. So are random numbers:
the ranks of a tp group go on from one random state, since their residual streams must drop the same elements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.engine.prepare import equalize
from megazero.parallel.collectives import broadcast
from megazero.parallel.foreign import part_of, sum_gradients
from megazero.parallel.foreign_plan import COUNTS, Policy, Split, is_output, plan_of
from megazero.parallel.sharding import has_spec
from megazero.parallel.topology import AxisGroup, Topology
from megazero.zero.init import forget, slice_of


def shard_foreign(
    module: nn.Module,
    topology: Topology,
    device: torch.device | None = None,
    *,
    policy: Policy | None = None,
) -> nn.Module:
    """The module with its linear layers split over `topology`'s tp axis, in place; as it is where that has one rank.
    Collective.

    Modules whose parameters say themselves what part of them is here (those of megazero.models) are left alone.

    Args:
        device: where the ranks exchange values; default: the CPU.
        policy: {class of layers: names of its row-parallel linears}; default: the plan that the model carries.

    Raises ConfigError without a plan, for one that is not understood, for sizes that tp does not divide, and for a
    layer whose weight another one shares.
    """
    tp = topology.group("tp")
    if tp.size == 1 or any(map(has_spec, module.parameters())):
        return module
    plan, shared = plan_of(module, policy, tp.size), _shared(module)
    _check_ties(plan.splits, shared)
    device = device or torch.device("cpu")
    equalize(module, topology, device, axis="tp")
    share_random_state(tp, device)
    parts: dict[nn.Module, nn.Module] = {}
    for split in plan.splits:
        if split.style == "sum_gradients":
            for name, parameter in split.module.named_parameters():
                sum_gradients(parameter, f"{split.name}.{name}", topology)
        elif split.splits and not _stays_whole(split, shared, tp.size):
            parts[split.module] = part_of(split.module, split.name, split.style, topology, _values, packed=split.packed)
    for holder in list(module.modules()):
        for name, child in holder._modules.items():
            if child is not None and child in parts:
                holder._modules[name] = parts[child]
    for holder in plan.counts:
        for count in COUNTS:
            if isinstance(value := getattr(holder, count, None), int):
                setattr(holder, count, value // tp.size)
    return module


def _stays_whole(split: Split, shared: set[nn.Parameter], ranks: int) -> bool:
    """An output layer that is tied to the embedding, or whose rows tp does not divide."""
    tied = any(parameter in shared for parameter in split.module.parameters())
    return is_output(split) and (tied or split.grains % ranks != 0)


def _check_ties(splits: list[Split], shared: set[nn.Parameter]) -> None:
    """Raises ConfigError for a weight that cannot be cut, as another module reads it too."""
    tied = [s.name for s in splits if s.splits and not is_output(s) and shared & set(s.module.parameters())]
    if tied:
        raise ConfigError(
            f"{', '.join(tied)} shares a parameter with another module, so that it cannot be split over tensor-"
            "parallel ranks. Take it out of the plan (model._tp_plan), or use tp_size 1."
        )


def _shared(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that stand in more than one module."""
    seen: set[nn.Parameter] = set()
    twice: set[nn.Parameter] = set()
    for holder in module.modules():
        for parameter in holder.parameters(recurse=False):
            (twice if parameter in seen else seen).add(parameter)
    return twice


def _values(parameter: nn.Parameter) -> Tensor:
    """All of a parameter, which `zero.Init` may have cut."""
    known = slice_of(parameter)
    if known is None:
        return parameter.data
    values = known.whole()
    forget(parameter)
    return values


def share_random_state(group: AxisGroup, device: torch.device) -> None:
    """Let all ranks of the group go on from its first rank's random state, CPU and GPU. Collective."""
    if group.size == 1:
        return
    torch.set_rng_state(broadcast(torch.get_rng_state().to(device), group, 0).cpu())
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        torch.cuda.set_rng_state(broadcast(state.to(device), group, 0).cpu(), device)
