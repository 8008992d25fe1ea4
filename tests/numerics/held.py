"""What a process holds: every tensor that the garbage collector knows, one entry a storage, and whose it is.

Not formulas and not our accounting: storages that were not there before the engine was built, between two steps.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor

from megazero.engine.engine import Engine


def storages() -> dict[int, tuple[int, Tensor]]:
    """By address: bytes, and one tensor in it. CPU tensors alone."""
    gc.collect()
    found: dict[int, tuple[int, Tensor]] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Tensor) or thing.device.type != "cpu" or thing.layout is not torch.strided:
            continue
        storage = thing.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = (storage.nbytes(), thing)
    return found


def component_bytes(engine: Engine, before: dict[int, tuple[int, Tensor]]) -> dict[str, int]:
    """Bytes by component of everything that came since `before` (whose tensors are alive, so that no address of theirs
    is another's by now)."""
    shards = engine.shards
    assert shards is not None
    whose: dict[int, str] = {}

    def claim(component: str, tensors: Any) -> None:
        for tensor in tensors:
            if tensor.numel():
                whose.setdefault(tensor.untyped_storage().data_ptr(), component)

    claim("weights", (p for p in engine.module.parameters() if p.stride() != (0,) * p.dim()))  # not a stand-in
    claim("weights", (bucket.shard for bucket in engine.zero.buckets if bucket.shard_file is None))
    claim("master weights", (p for group in shards.optimizer.param_groups for p in group["params"]))
    claim("optimizer state", (v for s in shards.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)))
    claim("gradients", (bucket.reduced for bucket in engine.zero.buckets))
    found: dict[str, int] = {}
    for address, (nbytes, _) in storages().items():
        if address not in before:
            component = whose.get(address, "other")
            found[component] = found.get(component, 0) + nbytes
    return found
