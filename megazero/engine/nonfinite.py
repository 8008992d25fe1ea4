"""One policy for losses and gradients that are NaN or infinite, in every stage and precision.

`skip` leaves the weights alone and warns, `raise` stops, `ignore` goes on. The message names the rank whose own
gradients were bad before they were summed, and its first bad parameter. From stage 2 on only the sum is left: the rank
is told by the sum of its own bucket, the parameter by the rank that holds the bad part of the reduced one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megazero.parallel.collectives import gather_objects
from megazero.zero.buckets import Bucket
from megazero.zero.zero import Zero


@dataclass(frozen=True)
class _Report:
    """What one rank saw."""

    loss: float
    groups: list[tuple[int, ...]]
    """The ranks with the same parameters, for each bucket."""
    own: list[tuple[int, str | None]]
    """Buckets whose gradients were bad on this rank alone, with the first bad parameter if it can still be told."""
    summed: dict[int, str]
    """First bad parameter in this rank's part of each reduced bucket."""


def describe(zero: Zero, loss: float, local_loss: float) -> str:
    """Who made the bad number. Collective over the world; called only when there is one."""
    reports: list[_Report] = gather_objects(_report(zero, local_loss), zero.topology.group("world"))
    lines = []
    for rank, report in enumerate(reports):
        if report.own:
            bucket, parameter = report.own[0]
            same = [r for r in reports if bucket in r.summed and r.groups[bucket] == report.groups[bucket]]
            of_sum = [r.summed[bucket] for r in same]
            lines.append(f"rank {rank}: gradient of {parameter or next(iter(of_sum), 'an unknown parameter')}")
        elif not math.isfinite(report.loss):
            lines.append(f"rank {rank}: loss {report.loss}")
    if not lines:
        lines.append("no single rank: finite gradients overflowed when they were summed or squared")
    return f"non-finite loss or gradient (loss {loss:.6g}); " + "; ".join(lines[:4]) + _of_slices(zero, loss)


def _of_slices(zero: Zero, loss: float) -> str:
    """Stage 3: what else NaN may come from. fp16's overflows need no such hint."""
    if zero.gatherer is None or zero.dtype == torch.float16 or math.isinf(loss):
        return ""
    return (
        ". Stage 3 shows parameters as NaN outside the forward of their module: if the loss, or a function saved for "
        "backward, reads some elsewhere, let it do so inside megazero.zero.GatheredParameters"
    )


def _report(zero: Zero, local_loss: float) -> _Report:
    own, summed = [], {}
    for index, (bucket, total) in enumerate(zip(zero.buckets, zero.local_sums, strict=True)):
        if not bool(torch.isfinite(total)):
            own.append((index, None if bucket.grads is None else _first_bad(bucket, bucket.grads, 0)))
        if bucket.grads is None and (name := _first_bad(bucket, bucket.reduced, bucket.owned[0])) is not None:
            summed[index] = name
    return _Report(local_loss, [bucket.group.ranks for bucket in zero.buckets], own, summed)


def _first_bad(bucket: Bucket, flat: torch.Tensor, first: int) -> str | None:
    """The first parameter with a bad element in `flat`, which begins at the bucket's element `first`."""
    for place, lo, hi in bucket.parts(first, first + flat.numel()):
        if not bool(torch.isfinite(flat[lo - first : hi - first]).all()):
            return place.spec.name
    return None
