"""Faults that context parallelism could have: keys that are not seen, or in the wrong place, or with a wrong share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megazero.engine.engine import Engine
from megazero.ops import attention_block
from megazero.parallel import context, ring, ulysses
from megazero.parallel.topology import AxisGroup


def ring_step_skipped(engine: Engine) -> None:
    """A rank that computes with the other's keys and forgets the result."""
    if engine.topology.group("cp").rank == 1:
        _during_steps(engine, ring, "merge_", lambda out, lse, part, part_lse: None)


def ring_merge_without_shares(engine: Engine) -> None:
    """Parts that are averaged instead of weighted by their log-sum-exp."""

    def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        attention_block.merge_(out, lse, part, lse.clone())

    _during_steps(engine, ring, "merge_", merge)


def ring_mask_in_wrong_order(engine: Engine) -> None:
    """Document masks that fit this rank's keys, but not those that come from others."""
    right = context.ring_order

    def order(length: int, group: AxisGroup, device: torch.device) -> Tensor:
        parts = right(length, group, device).chunk(group.size)
        return torch.cat([part if rank == group.rank else part.flip(0) for rank, part in enumerate(parts)])

    _during_steps(engine, context, "ring_order", order)


def ring_key_gradients_dropped(engine: Engine) -> None:
    """Keys and values that get no gradient from the queries of other ranks."""

    def backward(*tensors: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, ...]:
        grads = attention_block.attend_backward(*tensors, causal=causal, mask=mask)
        return grads if causal else (grads[0], torch.zeros_like(grads[1]), torch.zeros_like(grads[2]))

    _during_steps(engine, ring, "attend_backward", backward)


def exchange_in_rank_order(engine: Engine) -> None:
    """Heads that see the ranks' tokens one rank after the other, not in logical order."""
    _during_steps(engine, ulysses, "logical_order", lambda parts: parts.movedim(0, 1).flatten(1, 2))


def _during_steps(engine: Engine, module: Any, name: str, value: Any) -> None:
    """Put `value` in the module's place of that name while the engine trains: the process lives on after the test."""
    step, right = engine.train_step, getattr(module, name)

    def train_step(*args: Any, **kwargs: Any) -> Any:
        setattr(module, name, value)
        try:
            return step(*args, **kwargs)
        finally:
            setattr(module, name, right)

    engine.train_step = train_step  # type: ignore[method-assign]


CONTEXT_FAULTS: dict[str, Callable[[Engine], None]] = {
    fault.__name__: fault
    for fault in (
        ring_step_skipped,
        ring_merge_without_shares,
        ring_mask_in_wrong_order,
        ring_key_gradients_dropped,
        exchange_in_rank_order,
    )
}
