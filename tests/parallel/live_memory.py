"""How many bytes a forward leaves alive for its backward: storages that operations made and that still exist."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Born(TorchDispatchMode):
    """Notes the storages of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result


def live_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that live when `forward` has returned and its result is held."""
    with _Born() as born:
        result = forward()
    time.sleep(0.1)  # gloo's threads let go of what they sent a moment after it has arrived
    gc.collect()
    alive = sum(size for reference, size in born.storages.values() if not reference.expired())
    assert result is not None
    return alive
