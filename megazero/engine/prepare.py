"""Making a user's module ready: its buffers on the device, and the same values on all ranks before they are sharded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from megazero.base.errors import ConfigError
from megazero.parallel.collectives import broadcast
from megazero.parallel.expert import spread_modules
from megazero.parallel.sharding import has_spec, spec_of
from megazero.parallel.topology import Topology
from megazero.zero.init import slice_of


def check_real(module: nn.Module) -> None:
    """Raises ConfigError for what is no module, and for parameters without values that nobody knows how to fill."""
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model={module!r:.60}, a {type(module).__name__}, is no module. Give an nn.Module: one made of its "
            "class, or loaded by its name (from_pretrained)."
        )
    lazy = [n for n, p in module.named_parameters() if is_lazy(p)]
    if lazy:
        raise ConfigError(
            f"{len(lazy)} parameters have no shape yet, {lazy[0]} for one: lazy modules learn it from their first "
            "input. Call the model on a batch before initialize()."
        )
    empty = [n for n, p in module.named_parameters() if p.is_meta and not has_spec(p)]
    if empty:
        raise ConfigError(
            f"{len(empty)} parameters are on the meta device, {empty[0]} for one, and have no values to start from. "
            "Build the model outside torch.device('meta'); for one that is larger than memory use megazero.zero.Init()."
        )


def check_split(module: nn.Module, topology: Topology) -> None:
    """Raises ConfigError for a module that an earlier engine has split over tp, where this one has no such axis."""
    specs = {name: spec_of(name, p) for name, p in module.named_parameters()}
    split = [name for name, s in specs.items() if s.copies is None and s.local_shape != s.shape]
    if split and topology.size("tp") == 1:
        raise ConfigError(
            f"{len(split)} parameters, {split[0]} for one, are this rank's parts: an earlier engine has split the "
            "module with tensor parallelism. Use its tp_size again, or load engine.consolidated_state_dict() into a "
            "fresh module."
        )


def check_rewritten(module: nn.Module, topology: Topology, dtype: torch.dtype) -> None:
    """Raises ConfigError for weights that their own forward rewrites, where ranks would rewrite other rows than each
    other, or the fp32 masters would not hear of it."""
    if topology.size("zero") == 1 and dtype == torch.float32:
        return
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None and part.weight.requires_grad:
            raise ConfigError(
                f"{name or type(part).__name__} has max_norm={part.max_norm}: its forward scales the rows that this "
                "rank's batch reads, which is lost on the other ranks and in the fp32 masters. Set max_norm to None, "
                "and scale rows where they are read, or after step() inside GatheredParameters(weight, "
                "modifier_rank=0)."
            )


def tell_narrowed(module: nn.Module, dtype: torch.dtype, say: Callable[[str], None]) -> None:
    """Say which parameters lose digits without having been asked to: fp64 ones."""
    wide = [name for name, p in module.named_parameters() if p.dtype == torch.float64]
    if wide:
        say(
            f"{len(wide)} parameters were {torch.float64}, {wide[0]} for one: they are {dtype} from now on, with fp32 "
            "masters. Give the model inputs of that type."
        )


def move_buffers(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Buffers to the device; floating ones that are saved with the module in its weights' type, as module.to(dtype)
    does. What is not saved (tables of rotary frequencies) keeps its type, which it was computed in for a reason."""
    for holder in module.modules():
        for name, buffer in holder._buffers.items():
            if buffer is None or buffer.is_meta:
                continue
            cast = buffer.is_floating_point() and name not in holder._non_persistent_buffers_set
            holder._buffers[name] = buffer.to(device=device, dtype=dtype if cast else buffer.dtype)


def equalize(module: nn.Module, topology: Topology, device: torch.device, axis: str = "zero") -> None:
    """Give every rank of an axis's group the first one's parameters and buffers; those of spread experts go to the
    ranks that hold copies of these. Collective."""
    everyone = topology.group(axis)
    if everyone.size == 1:
        return
    tensors = {p.data: spec_of("", p).copies or everyone for p in module.parameters() if slice_of(p) is None}
    spread, copies = spread_modules(module), topology.group("expert_dp")
    for holder in module.modules():
        tensors |= dict.fromkeys(holder.buffers(recurse=False), copies if holder in spread else everyone)
    for tensor, group in tensors.items():
        if tensor.is_meta:
            continue
        moved = tensor.to(device).contiguous()
        broadcast(moved.view(torch.uint8) if moved.dtype == torch.bool else moved, group, 0)
        if moved.data_ptr() != tensor.data_ptr():
            tensor.copy_(moved)
