"""Faults that ZeRO could have, each of which the comparison with plain torch must see (tests of the tests).

A fault changes one engine and nothing else: the rank processes live on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from megazero.engine.engine import Engine
from megazero.zero.buckets import Bucket
from megazero.zero.reduction import Reduction
from tests.numerics.setting import Run
from tests.numerics.sharded import Change


def reduced_bucket_dropped(engine: Engine) -> None:
    """The reduce-scatter of one bucket ends, and nobody takes its result."""
    reduction, dropped = engine.zero.reduction, 1

    def finish(self: Reduction, index: int) -> None:
        Reduction._finish(self, index)
        if index == dropped:
            self._stored.discard(index)  # so that the boundary takes the shard for empty

    _replace(reduction, "_finish", finish)


def copied_instead_of_added(engine: Engine) -> None:
    """The shard holds the last micro-batch's gradients, not the sum."""

    def finish(self: Reduction, index: int) -> None:
        self._stored.discard(index)
        Reduction._finish(self, index)

    _replace(engine.zero.reduction, "_finish", finish)


def stale_shard(engine: Engine) -> None:
    """Masters are updated, and one bucket's shard stays what it was: forwards gather the old weights."""
    bucket = next(bucket for bucket in engine.zero.buckets if bucket.unit == "blocks.1")
    assert bucket.parameters_sharded
    _replace(bucket, "cast_master", lambda self, master=None: None)


def wrong_scale(engine: Engine) -> None:
    """The scale grows between a backward and the unscaling of its gradients, once."""
    scaler, finish = engine.scaler, engine.zero.finish_reduction
    steps = 0
    assert scaler is not None

    def finish_reduction() -> None:
        nonlocal steps
        finish()
        steps += 1
        if steps == 5:
            scaler.scale *= 2

    engine.zero.finish_reduction = finish_reduction  # type: ignore[method-assign]


def not_clipped(engine: Engine) -> None:
    """The norm is measured, and gradients stay as they are."""
    engine.max_norm = 0.0


def state_not_written(engine: Engine) -> None:
    """After its first update, one bucket's second moment on NVMe stays as it is."""
    store = engine.zero.homes.optimizer_store
    assert store is not None
    write, written = store.write, set[str]()

    def write_once(name: str, tensor: Any) -> Any:
        if name.startswith("blocks.1.") and name.endswith(".exp_avg_sq"):
            if name in written:
                return write(f"{name}.elsewhere", tensor)
            written.add(name)
        return write(name, tensor)

    store.write = write_once  # type: ignore[method-assign]


def master_not_written(engine: Engine) -> None:
    """One bucket's master on NVMe stays what it was at the start."""
    bucket = next(bucket for bucket in engine.zero.buckets if bucket.unit == "blocks.1")
    assert bucket.master_file is not None and engine.zero.homes.optimizer_store is not None
    store, name = engine.zero.homes.optimizer_store, bucket.master_file.name
    write = store.write
    store.write = lambda of, tensor: write(f"{of}.elsewhere" if of == name else of, tensor)  # type: ignore[method-assign]


FAULTS: dict[str, tuple[Run, Change]] = {
    "reduced bucket dropped": (Run(2), reduced_bucket_dropped),
    "copied instead of added": (Run(2, accumulation=4), copied_instead_of_added),
    "stale shard": (Run(3, "bf16"), stale_shard),
    "wrong scale": (Run(1, "fp16"), wrong_scale),
    "not clipped": (Run(1, clip=True), not_clipped),
    "second moment not written": (Run(1, offload="nvme"), state_not_written),
    "master not written": (Run(3, "bf16", offload="nvme"), master_not_written),
}
"""By name: on which run, and what happens to its engine."""
HARMLESS = sorted({run for run, _ in FAULTS.values()}, key=str)


def _replace(of: Reduction | Bucket, name: str, function: Callable[..., Any]) -> None:
    """Give one object another method."""
    setattr(of, name, MethodType(function, of))
