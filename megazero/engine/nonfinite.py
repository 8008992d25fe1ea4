"""One policy for losses and gradients that are NaN or infinite, in every stage and precision.

`skip` leaves the weights alone and warns, `raise` stops, `ignore` goes on. The message names the rank whose own
gradients were bad before they were summed, and its first bad parameter.
"""

from __future__ import annotations

import torch

from megazero.parallel.collectives import gather_objects
from megazero.zero.zero import Zero


def describe(zero: Zero, loss: float, local_loss: float) -> str:
    """Who made the bad number. Collective over the world; called only when there is one."""
    reports = gather_objects((local_loss, _first_bad(zero)), zero.topology.group("world"))
    lines = []
    for rank, (rank_loss, parameter) in enumerate(reports):
        if parameter is not None:
            lines.append(f"rank {rank}: gradient of {parameter}")
        elif rank_loss != rank_loss or rank_loss in (float("inf"), float("-inf")):
            lines.append(f"rank {rank}: loss {rank_loss}")
    if not lines:
        lines.append("no single rank: finite gradients overflowed when they were summed or squared")
    return f"non-finite loss or gradient (loss {loss:.6g}); " + "; ".join(lines[:4])


def _first_bad(zero: Zero) -> str | None:
    for bucket, total in zip(zero.buckets, zero.local_sums, strict=True):
        if bool(torch.isfinite(total)):
            continue
        for place in bucket.placed:
            if not bool(torch.isfinite(bucket.grads[place.start : place.stop]).all()):
                return place.spec.name
    return None
