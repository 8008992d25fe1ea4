"""An exchange of parts of unequal sizes: every rank gives each other rank some elements, perhaps none."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megazero.parallel.topology import AxisGroup


def exchange_parts(outgoing: list[Tensor], incoming: list[int], group: AxisGroup) -> list[Tensor]:
    """Give `outgoing[r]`, flat and all of one type, to each rank r; get `incoming[r]` elements from it.

    Own part included, which is not copied over any wire. Collective: all ranks of the group call it.
    """
    if group.size == 1:
        return outgoing
    sent = torch.cat(outgoing)
    foreign = sent.numel() - outgoing[group.rank].numel()
    group.traffic.add(group.axis, "send", group.size, elements=foreign, itemsize=sent.element_size())
    received = sent.new_empty(sum(incoming))
    dist.all_to_all_single(received, sent, incoming, [part.numel() for part in outgoing], group=group.handle)
    return list(received.split(incoming))


def wire_device(group: AxisGroup, home: torch.device) -> torch.device:
    """Where a tensor must be to travel: on this process's GPU over NCCL, even when its home is the CPU (offload)."""
    if group.size > 1 and home.type == "cpu" and dist.get_backend(group.handle) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return home
