"""A sharded model's weights as whole tensors on one rank, under the module's own names; and what is in no bucket.

    masters (fp32), frozen parameters, persistent buffers ─► boxes of logical tensors ─► whole tensors on rank 0

Every tensor goes as the boxes that its ranks hold, so one way serves all stages and all of tp, pp and dp.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megazero.parallel.collectives import gather_objects, receive, send
from megazero.parallel.expert import spread_modules
from megazero.parallel.sharding import Box, spec_of, spec_slice_boxes, whole
from megazero.zero.zero import Zero

Boxed = tuple[str, tuple[int, ...], Box, Tensor]
"""(logical name, logical shape, box, view of the box's shape)"""


def consolidated(module: nn.Module, zero: Zero, *, fp32: bool, exclude_frozen: bool) -> dict[str, Tensor]:
    """The whole model in CPU memory on rank 0, {} elsewhere. Collective over the world."""
    zero.wait_parameters()
    dtype = torch.float32 if fp32 else zero.dtype
    mine = [(*piece, dtype) for piece in zero.pieces(zero.masters(), for_save=True)]
    for kind, pieces in others(module, zero, for_save=True).items():
        if kind == "frozen" and exclude_frozen:
            continue
        mine += [
            (*piece, torch.float32 if fp32 and piece[3].is_floating_point() else piece[3].dtype) for piece in pieces
        ]
    empty = _empty(module, exclude_frozen)
    mine += [(*piece, dtype if piece[3].is_floating_point() else piece[3].dtype) for piece in empty]
    logical = _to_first(zero, mine)
    everywhere = gather_objects(list(_keys(module)), zero.topology.group("world"))
    if zero.topology.rank:
        return {}
    return {key: logical[name] for of_rank in everywhere for key, name in of_rank if name in logical}


def _empty(module: nn.Module, exclude_frozen: bool) -> Iterator[Boxed]:
    """Parameters without an element, which no rank has a slice of."""
    for name, parameter in module.named_parameters():
        if not parameter.numel() and (parameter.requires_grad or not exclude_frozen):
            spec = spec_of(name, parameter)
            yield spec.name, spec.shape, Box((0,) * len(spec.shape), spec.local_shape), parameter.detach()


def _to_first(zero: Zero, mine: list[tuple[str, tuple[int, ...], Box, Tensor, torch.dtype]]) -> dict[str, Tensor]:
    """Whole tensors out of all ranks' boxes, on rank 0, each in the type given with it."""
    world = zero.topology.group("world")
    plans = gather_objects([(name, shape, box, dtype) for name, shape, box, _, dtype in mine], world)
    found: dict[str, Tensor] = {}
    if world.rank:
        for _, _, box, tensor, dtype in mine:
            if box.numel:
                send(tensor.detach().to(device=zero.device, dtype=dtype).contiguous(), world, 0).wait()
        return found
    for rank, plan in enumerate(plans):
        for number, (name, shape, box, dtype) in enumerate(plan):
            if rank == 0:
                value = mine[number][3].detach().to(device="cpu", dtype=dtype)
            else:
                value = torch.empty(box.shape, dtype=dtype, device=zero.device)
                value = receive(value, world, rank).cpu() if box.numel else value.cpu()
            if name not in found:
                found[name] = torch.empty(shape, dtype=dtype)
            box.of(found[name]).copy_(value)
    return found


def others(module: nn.Module, zero: Zero, *, for_save: bool) -> dict[str, list[Boxed]]:
    """What the buckets of trained parameters don't hold: frozen parameters and persistent buffers, as boxes.

    For saving, each is given by one rank; for loading, by all that hold it.
    """
    trained = {place.parameter for bucket in zero.buckets for place in bucket.placed}
    sharded = {place.parameter for bucket in zero.frozen for place in bucket.placed}
    found: list[Boxed] = []
    for name, parameter in module.named_parameters():
        spec = spec_of(name, parameter)
        if (
            parameter in trained
            or parameter in sharded
            or (for_save and not (zero.copies_of(parameter).rank == 0 and spec.owned_by(zero.topology.rank)))
        ):
            continue
        flat = parameter.detach().view(-1)
        for at, box in spec_slice_boxes(spec, 0, flat.numel()):
            found.append((spec.name, spec.shape, box, flat[at : at + box.numel].view(box.shape)))
    found += zero.pieces(zero.frozen_shards(), for_save=for_save)
    buffers: list[Boxed] = []
    spread, copies = spread_modules(module), zero.topology.group("expert_dp")
    for name, holder, buffer in persistent_buffers(module):
        speaks = (copies if holder in spread else zero.group).rank == 0 and zero.topology.group("tp").rank == 0
        if speaks or not for_save:
            spec = whole(name, tuple(buffer.shape))
            buffers.append((name, spec.shape, spec.boxes[0], buffer.detach()))
    return {"frozen": found, "buffers": buffers}


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The buffers that belong to the module's state dict, each once: name, the module that holds it, itself."""
    seen: set[Tensor] = set()
    for path, holder in module.named_modules():
        for name, buffer in holder._buffers.items():
            if buffer is not None and name not in holder._non_persistent_buffers_set and buffer not in seen:
                seen.add(buffer)
                yield f"{path}.{name}" if path else name, holder, buffer


def _keys(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The keys of the module's state dict, shared tensors under each of their names, with their logical names."""
    first = {buffer: name for name, _, buffer in persistent_buffers(module)}
    for path, holder in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in holder._parameters.items():
            if parameter is not None:
                yield prefix + name, spec_of(prefix + name, parameter).name
        for name, buffer in holder._buffers.items():
            if buffer in first:
                yield prefix + name, first[buffer]
