"""Where the inputs of what is recomputed wait for backward: whole or in parts over tp, on the device or in CPU memory,
each on its own or in one buffer.

    input [b, s, h] ─ flat ─ own part of it (partition) ─► slot of a buffer (slots) or new tensor, on device or CPU
    backward: to the device ─ gather the parts ─ [b, s, h]

Rajbhandari et al., ZeRO, arXiv 1910.02054, sections 6.1 (partition, offload) and 6.3 (contiguous buffers).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megazero.parallel.collectives import all_gather_slices
from megazero.parallel.topology import AxisGroup


class SavedInputs:
    """A way to keep tensors that autograd saves.

    Parameters, integers and tensors with fewer elements than `partition` has ranks stay as they are.

    Args:
        partition: ranks on which the inputs are equal: each keeps a part, and all gather them in backward. That is tp
            without sequence parallelism (with it, inputs are parts already).
        offload: keep them in CPU memory, pinned, copied in the order of the device's work. Nothing to do for a tensor
            that is in CPU memory already.
        slots: copy them into buffers of so many slots, made for each size when it first comes and never freed, so that
            what lives until backward does not fragment the memory of what does not. 0: no buffers.
    """

    def __init__(self, *, partition: AxisGroup | None = None, offload: bool = False, slots: int = 0) -> None:
        self.group = partition if partition is not None and partition.size > 1 else None
        self.offload, self.slots = offload, slots
        self._free: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = {}

    def hooks(self) -> saved_tensors_hooks:
        """The context in which autograd saves tensors this way."""
        return saved_tensors_hooks(self.keep, self.restore)

    @torch.no_grad()
    def keep(self, tensor: Tensor) -> Tensor | Kept:
        """Put a tensor away."""
        home = torch.device("cpu") if self.offload else tensor.device
        stays = self.group is None and not self.slots and home == tensor.device
        least = 1 if self.group is None else self.group.size
        if stays or isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or tensor.numel() < least:
            return tensor
        part = tensor.detach().reshape(-1)
        if self.group is not None:
            part = F.pad(part, (0, -part.numel() % least)).chunk(least)[self.group.rank]
        pin = home != tensor.device
        free = self._slots_for(part.numel(), part.dtype, home, pin)
        place = free.pop() if free is not None else torch.empty_like(part, device=home, pin_memory=pin)
        place.copy_(part, non_blocking=True)
        return Kept(place, tensor.shape, tensor.device, free)

    @torch.no_grad()
    def restore(self, kept: Tensor | Kept) -> Tensor:
        """The tensor again, in memory of its own. Collective over `partition`."""
        if isinstance(kept, Tensor):
            return kept
        part, size = kept.place, kept.shape.numel()
        ranks, rank = (1, 0) if self.group is None else (self.group.size, self.group.rank)
        flat = torch.empty(ranks * part.numel(), dtype=part.dtype, device=kept.device)
        flat.chunk(ranks)[rank].copy_(part, non_blocking=True)
        if self.group is not None:
            all_gather_slices(flat, self.group, padding=flat.numel() - size).wait()
        return flat[:size].view(kept.shape)

    def _slots_for(self, size: int, dtype: torch.dtype, home: torch.device, pin: bool) -> list[Tensor] | None:
        """The free slots of this size, at least one; None without buffers."""
        if not self.slots:
            return None
        free = self._free.setdefault((size, dtype, home), [])
        if not free:
            free += torch.empty(self.slots, size, dtype=dtype, device=home, pin_memory=pin).unbind()
        return free


class Kept:
    """One input put away. Its slot is free again when autograd lets go of it."""

    def __init__(self, place: Tensor, shape: torch.Size, device: torch.device, free: list[Tensor] | None) -> None:
        self.place, self.shape, self.device, self.free = place, shape, device, free

    def __del__(self) -> None:
        if self.free is not None:
            self.free.append(self.place)
