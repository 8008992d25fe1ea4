"""An independent count of what a rank hands to torch.distributed: its functions are watched, not ours.

all-reduce 2n(N-1)/N · reduce-scatter, all-gather, all-to-all, broadcast n(N-1)/N · point to point: what is sent
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

SCALARS = 8
"""Elements of a tensor that is a few numbers, not a part of the model."""


@dataclass
class Seen:
    """Bytes on the wire of one rank, in tensors and in few numbers."""

    tensors: float = 0.0
    scalars: float = 0.0
    calls: int = 0
    """A batch of sends is one."""

    def add(self, tensor: Tensor, whole: int, share: float) -> None:
        """`whole`: elements of the whole tensor of the operation."""
        nbytes = whole * tensor.element_size() * share
        if whole <= SCALARS:
            self.scalars += nbytes
        else:
            self.tensors += nbytes


@contextmanager
def watched() -> Iterator[Seen]:
    """Count what this rank sends meanwhile. What is not counted must not be called in a step; `isend` by
    itself cannot be watched, as operations of a batch are told by it."""
    seen = Seen()
    ranks = dist.get_world_size()
    part = (ranks - 1) / ranks

    def batch(operations: list[dist.P2POp]) -> None:
        for operation in operations:
            if operation.op is dist.isend:
                seen.add(operation.tensor, operation.tensor.numel(), 1.0)

    counts: dict[str, Callable[..., None]] = {
        "all_reduce": lambda tensor, *a, **k: seen.add(tensor, tensor.numel(), 2 * part),
        "reduce_scatter_tensor": lambda out, of, *a, **k: seen.add(of, of.numel(), part),
        "all_gather_into_tensor": lambda out, of, *a, **k: seen.add(of, out.numel(), part),
        "all_gather": lambda outs, of, *a, **k: seen.add(of, of.numel() * ranks, part),
        "all_to_all_single": lambda out, of, *a, **k: seen.add(of, of.numel(), part),
        "broadcast": lambda tensor, *a, **k: seen.add(tensor, tensor.numel(), part),
        "batch_isend_irecv": batch,
    }
    unknown = [
        "reduce",
        "gather",
        "scatter",
        "reduce_scatter",
        "all_to_all",
        "all_gather_object",
        "broadcast_object_list",
    ]
    with ExitStack() as stack:
        for name, count in counts.items():
            stack.enter_context(mock.patch.object(dist, name, _counted(seen, getattr(dist, name), count)))
        for name in unknown:
            stack.enter_context(mock.patch.object(dist, name, _refused(name)))
        yield seen


def _counted(seen: Seen, function: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        seen.calls += 1
        count(*arguments, **keywords)
        return function(*arguments, **keywords)

    return call


def _refused(name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError(f"dist.{name} in a step: nobody counts it")

    return call
