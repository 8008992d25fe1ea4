"""After a collective has failed: which ranks are gone?

Every rank that is still there signs in at the process group's store; who has not after some seconds is gone. The
store is the launcher's, or rank 0's.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store


def missing_ranks(seconds: float = 10.0) -> list[int]:
    """The ranks that have not called this within `seconds` of us; [0] if the store itself is gone with rank 0.

    Each rank that saw the failure calls it once.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    missing = [other for other in range(world) if other != rank]
    try:
        store = _get_default_store()
        store.set_timeout(timedelta(seconds=seconds))
        store.set(f"megazero/alive/{rank}", "")
        end = time.monotonic() + seconds
        while missing and time.monotonic() < end:
            missing = [other for other in missing if not store.check([f"megazero/alive/{other}"])]
            time.sleep(0.1)
    except (dist.DistError, RuntimeError):
        return [0]
    return missing
