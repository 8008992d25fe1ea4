"""From reduced gradients to new weights: the one order of work, for every front, stage and precision.

finish the reduction → one pass for norm, loss and finiteness (one all-reduce over the world) → unscale with the
scale that this backward used → clip → step → update the scale → gather parameters
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megazero.base.errors import NonFiniteError
from megazero.engine.nonfinite import describe
from megazero.engine.optimizer import ShardOptimizer
from megazero.engine.scaler import LossScaler
from megazero.engine.timers import Timers
from megazero.parallel.collectives import all_reduce
from megazero.zero.zero import Zero


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss: float
    """Mean loss of the global batch (of its unmasked tokens, where they were counted); NaN when nobody told it."""
    grad_norm: float
    """Global gradient norm, unscaled, before clipping."""
    skipped: bool
    """The weights were left alone because of a non-finite number."""
    notice: float
    """Sum over the ranks of what they passed as `notice`."""
    warning: str | None
    """What to tell the user about this step."""
    overflow: bool = False
    """The gradients themselves were not finite."""
    items: float = 0.0
    """Over how many items of all ranks the loss is a mean, if they were counted."""


@dataclass(frozen=True)
class Divisors:
    """What the summed gradients and the summed losses are divided by."""

    gradient: float
    loss: float


def update(
    zero: Zero,
    shards: ShardOptimizer,
    scaler: LossScaler | None,
    timers: Timers,
    *,
    max_norm: float,
    policy: str,
    loss: Tensor | None,
    items: Tensor | None = None,
    notice: Tensor | None = None,
    speaks: bool = True,
    divisors: Callable[[float], Divisors],
) -> StepResult:
    """Finish a step. Collective over the world.

    Args:
        loss: this rank's share of the sum of losses, fp64 scalar; None when it is not known.
        items: this rank's share of a number that the divisors depend on.
        notice: a number to be summed over the ranks on the way, whatever they say.
        speaks: whether this rank's loss and items count: one rank of each model replica.
        divisors: from the sum of the items.

    Raises NonFiniteError under the policy `raise`, and when a loss scale at its minimum still overflows.
    """
    with timers("reduce"):
        zero.finish_reduction()
    scale = scaler.scale if scaler is not None else 1.0
    norm_squared = zero.norm_squared()
    zero_sum = torch.zeros_like(norm_squared)
    sums = {
        "norm": norm_squared,
        "loss": zero_sum if loss is None or not speaks else loss.to(norm_squared),
        "unused": torch.full_like(norm_squared, zero.count_unused()),
        **({} if items is None else {"items": items.to(norm_squared) if speaks else zero_sum}),
        **({} if notice is None else {"notice": notice.to(norm_squared)}),
    }
    everywhere = all_reduce(torch.stack(list(sums.values())), zero.topology.group("world")).tolist()
    found = dict(zip(sums, everywhere, strict=True))
    squared, by = found["norm"], divisors(found.get("items", 0.0))
    factor = 1.0 / (scale * by.gradient)
    norm = math.sqrt(squared) * factor if squared >= 0 else squared
    loss_mean = found["loss"] / by.loss if loss is not None else 0.0
    overflow, warning = not math.isfinite(norm), None
    skipped = policy != "ignore" and (overflow or not math.isfinite(loss_mean))
    if scaler is not None:
        skipped = skipped or overflow  # a scaled gradient that overflowed says nothing about the weights
    if skipped:
        own = float(loss) / by.loss if loss is not None else 0.0
        warning = describe(zero, loss_mean, own)
        if policy == "raise" and not (scaler is not None and scaler.dynamic and overflow):
            raise NonFiniteError(f"{warning}. Lower the learning rate or look at the data; --non-finite skip goes on.")
    else:
        if max_norm > 0 and norm > max_norm:
            factor *= max_norm / (norm + 1e-6)
        with timers("step"):
            shards.step(factor, unused=found["unused"] > 0)
    if scaler is not None and (said := scaler.update(overflow)) is not None:
        warning = f"{warning}; {said}" if warning else said
    return StepResult(
        loss_mean if loss is not None else math.nan,
        norm,
        skipped,
        found.get("notice", 0.0),
        warning,
        overflow,
        found.get("items", 0.0),
    )
