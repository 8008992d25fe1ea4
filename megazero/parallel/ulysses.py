"""Ulysses (Jacobs et al., arXiv 2309.14509): before attention the cp ranks exchange tokens for heads, after it back.

    q [b, s/cp, hq, d]    ─┐                 ┌─ [b, s, hq/cp, d]    ─┐
    k [b, s/cp, hkv, d]    ├─ all-to-all ────┤  [b, s, hkv/cp, d]    ├─ attention ─ all-to-all ─ [b, s/cp, hq, d]
    v [b, s/cp, hkv, d]   ─┘                 └─ [b, s, hkv/cp, d]   ─┘

Rank r gets the r-th part of the heads, and of its tokens' sequences everything, in logical order. Key/value heads that
do not divide among the ranks are sent as equal copies to those that share them; autograd adds up their gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megazero.parallel.exchange import swap_parts
from megazero.parallel.topology import AxisGroup


def tokens_to_heads(q: Tensor, k: Tensor, v: Tensor, group: AxisGroup) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of the tokens here -> this rank's heads of the whole sequence, in one exchange (see the picture)."""
    copies = group.size // math.gcd(k.shape[2], group.size)
    k, v = k.repeat_interleave(copies, dim=2), v.repeat_interleave(copies, dim=2)
    parts = [x.unflatten(2, (group.size, -1)) for x in (q, k, v)]  # [b, s/cp, cp, heads/cp, d] each
    sizes = [part.shape[3] for part in parts]
    sent = torch.cat(parts, dim=3).movedim(2, 0)  # [cp, b, s/cp, all heads/cp, d]
    received = logical_order(swap_parts(sent, group))
    q, k, v = received.split(sizes, dim=2)
    return q, k, v


def heads_to_tokens(x: Tensor, group: AxisGroup) -> Tensor:
    """[b, s, heads/cp, d] of each rank -> [b, s/cp, heads, d]."""
    received = swap_parts(rank_order(x, group.size), group)  # [cp, b, s/cp, heads/cp, d]
    return received.movedim(0, 2).flatten(2, 3)


def logical_order(parts: Tensor) -> Tensor:
    """Each rank's tokens [cp, b, s/cp, ..] -> the sequence [b, s, ..]: the ranks' first chunks, then, from the last
    rank to the first, their second ones."""
    first, second = parts.chunk(2, dim=2)
    return torch.cat([first, second.flip(0)]).movedim(0, 1).flatten(1, 2)


def rank_order(x: Tensor, size: int) -> Tensor:
    """The opposite: [b, s, ..] -> [cp, b, s/cp, ..]."""
    first, second = x.unflatten(1, (2 * size, -1)).movedim(1, 0).chunk(2)  # [cp, b, s / (2 cp), ..] each
    return torch.cat([first, second.flip(0)], dim=2)
