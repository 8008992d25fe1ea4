"""Taking over a module's parameters, wherever they are: real, on meta, cut by `Init`, trained or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megazero.parallel.sharding import ShardSpec, has_spec, spec_of, whole
from megazero.parallel.topology import Topology
from megazero.zero.buckets import ALIGNMENT, Placed, innermost
from megazero.zero.init import forget, slice_of


def values_of(initial: Callable[[Placed], Tensor], empty: set[nn.Parameter], place: Placed) -> Tensor:
    """A parameter's fp32 values, wherever they are now; if `Init` has cut it, its slices have no use any more."""
    if place.parameter in empty:
        return initial(place)
    known = slice_of(place.parameter)
    if known is None:
        return place.parameter.detach().float()
    values = known.whole().float()
    forget(place.parameter)
    return values


def with_leaves(model: nn.Module, units: list[str], ranks: int) -> list[str]:
    """The units, and every module outside them with parameters of its own that are worth a bucket: stage 3 gathers an
    embedding and an output layer each by itself. What is smaller stays together, and so do units that have no slice for
    every rank (single norms): many of these would all be the first ranks' alone."""
    slices = ranks * ALIGNMENT
    worth = 16 * slices  # elements; padding is at most a 16th of them
    modules = dict(model.named_modules(remove_duplicate=False))
    held = {unit: sum(p.numel() for p in modules[unit].parameters()) for unit in units if unit in modules}
    found = [unit for unit, elements in held.items() if elements >= slices]
    kept = list(found)
    for name, module in model.named_modules():
        if name in found or innermost(f"{name}.", kept) or not name:
            continue
        if sum(p.numel() for p in module.parameters(recurse=False)) >= worth:
            found.append(name)
    return found


Dropped = dict[nn.Parameter, RemovableHandle]
"""Parameters whose gradients are dropped, each with what ends that."""


def settle_others(model: nn.Module, placed: set[nn.Parameter], dtype: torch.dtype, device: torch.device) -> Dropped:
    """Move parameters that are in no bucket to the device, floating ones in the model's type."""
    dropped: Dropped = {}
    for parameter in model.parameters():
        if parameter not in placed:
            if (known := slice_of(parameter)) is not None:
                parameter.data = known.whole()
                forget(parameter)
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            parameter.data = parameter.data.to(device=device, dtype=kind)
            dropped |= drop_gradients([parameter])
    return dropped


def drop_gradients(parameters: Iterable[nn.Parameter]) -> Dropped:
    """Those of parameters that are not the optimizer's have no use."""
    return {p: p.register_post_accumulate_grad_hook(_drop_gradient) for p in parameters if p.requires_grad}


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class AssumedSpec(ShardSpec):
    """Of a parameter that said nothing itself. It is true for one engine: a pickled parameter is without it."""

    def __reduce__(self) -> Any:
        return type(None), ()


def give_specs(model: nn.Module, topology: Topology) -> None:
    """Describe the parameters of modules that know nothing of megazero: whole, and equal on all tp ranks."""
    for name, parameter in model.named_parameters():
        if not has_spec(parameter):
            spec = whole(name, tuple(parameter.shape))
            assumed = AssumedSpec(spec.name, spec.shape, spec.boxes, topology.group("tp").ranks)
            parameter.shard_spec = assumed  # type: ignore[attr-defined]


def forget_specs(model: nn.Module) -> None:
    """Undo `give_specs`: in the next engine names and ranks may be others."""
    for parameter in model.parameters():
        if isinstance(getattr(parameter, "shard_spec", None), AssumedSpec):
            del parameter.shard_spec  # type: ignore[attr-defined]


def leave_meta(model: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Give parameters that are on meta an empty tensor on `device` to be rebound, and return these; ties stay."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None or not old.is_meta:
                continue
            if old not in replaced:
                nowhere = torch.empty((), device=device).expand(old.shape)  # its memory comes with its bucket
                new = nn.Parameter(nowhere, requires_grad=old.requires_grad)
                new.shard_spec = spec_of(name, old)  # type: ignore[attr-defined]
                replaced[old] = new
            module._parameters[name] = replaced[old]
    return set(replaced.values())
