"""After a collective has failed: which ranks are gone?

Whoever saw the failure calls the roll at the process group's store (the launcher's, or rank 0's). On each rank a thread
answers, so that a rank answers too while it is stuck in a collective with a rank that waits for the dead one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_CALL = "megazero/roll-call"
_SECONDS_BETWEEN_LOOKS = 1.0


@contextmanager
def answering_roll_calls() -> Iterator[None]:
    """Meanwhile, a thread of this rank answers the roll. Does nothing without a process group."""
    if not dist.is_initialized():
        yield
        return
    store = _get_default_store().clone()  # type: ignore[attr-defined]  # missing from torch's stubs
    rank, over = dist.get_rank(), threading.Event()

    def answer() -> None:
        with suppress(dist.DistError, RuntimeError):  # the store is gone: there is nobody to answer
            while not over.wait(_SECONDS_BETWEEN_LOOKS):
                if store.check([_CALL]):
                    store.set(f"megazero/alive/{rank}", "")
                    return

    thread = threading.Thread(target=answer, name="roll-call", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_SECONDS_BETWEEN_LOOKS)


def missing_ranks(seconds: float = 8.0) -> list[int]:
    """The ranks that do not answer within `seconds`; [0] if the store itself is gone with rank 0."""
    rank, world = dist.get_rank(), dist.get_world_size()
    missing = [other for other in range(world) if other != rank]
    try:
        store = _get_default_store()
        store.set_timeout(timedelta(seconds=seconds))
        store.set(f"megazero/alive/{rank}", "")
        store.set(_CALL, "")
        end = time.monotonic() + seconds
        while missing and time.monotonic() < end:
            missing = [other for other in missing if not store.check([f"megazero/alive/{other}"])]
            time.sleep(0.1)
    except (dist.DistError, RuntimeError):
        return [0]
    return missing
