"""Faults that a layout could have, each of which the parity tests must see (tests of the tests)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megazero.engine.engine import Engine
from megazero.models.mlp import MLP
from megazero.parallel.collectives import Pending
from megazero.parallel.sharding import ShardSpec
from megazero.parallel.tensor import RowParallelLinear
from megazero.parallel.topology import AxisGroup, Topology
from tests.parity.faults_context import CONTEXT_FAULTS


def _without_tp(engine: Engine) -> Topology:
    """The topology as a module sees it that forgets the other tp ranks."""
    topology = engine.topology
    alone = AxisGroup("tp", (topology.rank,), 0, None)
    return replace(topology, groups=tuple(alone if group.axis == "tp" else group for group in topology.groups))


def forward_all_reduce_missing(engine: Engine) -> None:
    """A row-parallel linear that keeps its partial result."""
    next(m for m in engine.module.modules() if isinstance(m, RowParallelLinear)).topology = _without_tp(engine)


def backward_all_reduce_missing(engine: Engine) -> None:
    """An MLP whose input gradients are not summed over tp."""
    next(m for m in engine.module.modules() if isinstance(m, MLP)).topology = _without_tp(engine)


def sequence_gradients_not_summed(engine: Engine) -> None:
    """Norms under sequence parallelism that see their part of the sequence only."""
    copied_heads_not_summed(engine)


def copied_heads_not_summed(engine: Engine) -> None:
    """Key/value heads that several tp ranks hold, with gradients left apart."""
    for bucket in engine.zero.buckets:
        bucket.grad_sum = None


def replicas_counted_twice(engine: Engine) -> None:
    """A clip norm that counts replicated parameters on each rank."""
    everywhere: Callable[[ShardSpec, int], bool] = lambda spec, rank: True  # noqa: E731
    engine.zero.norm_squared = _with(ShardSpec, "owned_by", everywhere, engine.zero.norm_squared)  # type: ignore[method-assign]


def mean_of_means(engine: Engine) -> None:
    """Each data-parallel rank divides by its own token count and the gradients are averaged."""
    group = engine.topology.group("zero")

    def local_count(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * group.size

    engine._over_batch = local_count  # type: ignore[method-assign]


def gradient_not_reduced(engine: Engine) -> None:
    """A data-parallel bucket that keeps its own gradients."""
    bucket, reduction = engine.zero.buckets[0], engine.zero.reduction
    start = reduction._start

    def keep_first(index: int) -> None:
        own = bucket.grads.clone() if index == 0 and bucket.grads is not None else None
        start(index)
        if own is not None:
            reduction._under_way[0].wait()
            reduction._under_way[0] = Pending([], lambda: bucket.grads.copy_(own))  # type: ignore[union-attr,return-value]

    reduction._start = keep_first  # type: ignore[method-assign]


def gradient_scale_wrong(engine: Engine) -> None:
    """Gradients averaged over data-parallel ranks instead of summed."""
    finish = engine.zero.finish_reduction

    def scaled() -> None:
        finish()
        engine.zero.scale_gradients(1 / engine.topology.size("zero"))

    engine.zero.finish_reduction = scaled  # type: ignore[method-assign]


def parameters_not_gathered(engine: Engine) -> None:
    """A step after which ranks keep their old copies of the others' shards."""
    engine.zero.publish = lambda: None  # type: ignore[method-assign]


def tied_ends_not_summed(engine: Engine) -> None:
    """A tied embedding whose ends of the pipeline keep their gradients to themselves."""
    copied_heads_not_summed(engine)


def micro_batches_averaged(engine: Engine) -> None:
    """A pipeline whose gradients are the mean over micro-batches, not the sum."""
    assert engine.pipeline is not None
    train = engine.pipeline.train
    engine.pipeline.train = lambda batches, denominator: train(batches, denominator * len(batches))  # type: ignore[method-assign]


def _with(owner: Any, name: str, value: Any, function: Callable[[], Any]) -> Callable[[], Any]:
    """`function`, run while owner.name is `value`."""

    def patched() -> Any:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            return function()
        finally:
            setattr(owner, name, before)

    return patched


FAULTS: dict[str, Callable[[Engine], None]] = {
    fault.__name__: fault
    for fault in (
        forward_all_reduce_missing,
        backward_all_reduce_missing,
        copied_heads_not_summed,
        sequence_gradients_not_summed,
        tied_ends_not_summed,
        micro_batches_averaged,
        replicas_counted_twice,
        mean_of_means,
        gradient_not_reduced,
        gradient_scale_wrong,
        parameters_not_gathered,
    )
} | CONTEXT_FAULTS
