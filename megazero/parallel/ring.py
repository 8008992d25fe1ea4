"""Ring attention (Liu et al., arXiv 2310.01889): keys and values travel round the cp ranks while each works on those
that it has, and the results are merged by log-sum-exp.

Rank r holds the chunks r and 2·cp - 1 - r of the sequence, so what it computes with rank j's keys is a rectangle:

    j = r   all queries   × all keys, causal
    j < r   all queries   × j's first half          (j's second half is later than all queries here)
    j > r   second half   × all keys                (the first half of the queries is earlier than all keys of j)

Nothing that causality hides is computed, and every rank does equal work in every step. Backward sends keys and values
round again and, one step behind them, their fp32 gradients, which are home after cp steps. Sending goes on while the
rank computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megazero.ops.attention_block import attend, attend_backward, merge_
from megazero.parallel.collectives import Pending, pass_on
from megazero.parallel.topology import AxisGroup


def ring_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: AxisGroup) -> Tensor:
    """Causal attention of the tokens here over the whole sequence.

    q [b, s/cp, hq, d], k and v [b, s/cp, hkv, d] -> [b, s/cp, hq, d]; `mask` is `ring_document_mask`'s, or None.
    """
    out: Tensor = _Ring.apply(q, k, v, mask, group)
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: AxisGroup) -> Tensor:
        own = torch.stack([k, v])  # [2, b, s/cp, hkv, d]: one message
        for step, held in enumerate(_travel(own, group)):
            part = _part(step, q.shape[1], group, mask)
            keys, values = held[:, :, part.keys]
            result, part_lse = attend(q[:, part.queries], keys, values, causal=part.causal, mask=part.mask)
            if step == 0:  # every query sees itself, so lse is finite from here on
                out, lse = result.float(), part_lse.contiguous()
            else:
                merge_(out[:, part.queries], lse[:, :, part.queries], result, part_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, own, mask, out, lse)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, own, mask, out, lse = ctx.saved_tensors
        group: AxisGroup = ctx.group
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        gradient = torch.zeros(own.shape, dtype=torch.float32, device=q.device)  # of `held`, by the ranks before
        arriving = Pending([])
        for step, held in enumerate(_travel(own, group)):
            part = _part(step, q.shape[1], group, mask)
            keys, values = held[:, :, part.keys]
            here = (grad[:, part.queries], q[:, part.queries], keys, values, out[:, part.queries])
            more_q, *more = attend_backward(*here, lse[:, :, part.queries], causal=part.causal, mask=part.mask)
            dq[:, part.queries] += more_q
            arriving.wait()
            gradient[:, :, part.keys] += torch.stack(more)
            gradient, arriving = pass_on(gradient, group)  # after the last step it is our own, on its way home
        arriving.wait()
        dk, dv = gradient.to(q.dtype)
        return dq.to(q.dtype), dk, dv, None, None


def _travel(own: Tensor, group: AxisGroup) -> Iterator[Tensor]:
    """What this rank has, then what the ranks before it have, from the nearest on; the next one is under way while the
    caller works on the present one."""
    held = own
    for _ in range(group.size - 1):
        coming, pending = pass_on(held, group)
        yield held
        pending.wait()
        held = coming
    yield held


@dataclass(frozen=True)
class _Part:
    """Which queries here see which keys of the rank whose turn it is."""

    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None


def _part(step: int, length: int, group: AxisGroup, mask: Tensor | None) -> _Part:
    """The work of a step, in which this rank holds the keys of the rank `step` places before it."""
    owner = (group.rank - step) % group.size
    queries = slice(length // 2, None) if owner > group.rank else slice(None)
    keys = slice(0, length // 2) if owner < group.rank else slice(None)
    if mask is None:
        return _Part(queries, keys, owner == group.rank, None)
    of_owner = mask[..., owner * length : (owner + 1) * length]
    return _Part(queries, keys, False, of_owner[:, :, queries, keys])
