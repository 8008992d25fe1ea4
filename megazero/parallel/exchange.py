"""Exchanges in which every rank gives each other rank a part: of equal sizes, with gradients that travel back; or of
any sizes, perhaps none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megazero.parallel.collectives import all_to_all
from megazero.parallel.topology import AxisGroup


def swap_parts(x: Tensor, group: AxisGroup) -> Tensor:
    """Part i along dim 0 of [size, ..] goes to rank i; the result's part i came from rank i. So do gradients back."""
    swapped: Tensor = _SwapParts.apply(x, group)
    return swapped


class _SwapParts(torch.autograd.Function):
    # Part i goes to rank i and comes from rank i: its own transpose.
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: AxisGroup) -> Tensor:
        ctx.group = group
        return all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_to_all(grad, ctx.group), None


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
