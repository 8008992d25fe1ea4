"""Which ranks are gone: none, one, and the one that holds the store."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from megazero.parallel.liveness import missing_ranks


def check_all_there() -> None:
    start = time.monotonic()
    assert missing_ranks(seconds=20.0) == []
    assert time.monotonic() - start < 10


def check_one_gone() -> None:
    if dist.get_rank() == 1:
        return  # it never signs in
    assert missing_ranks(seconds=1.0) == [1]


def check_late() -> None:
    """A rank that notices the failure a little later is not gone."""
    time.sleep(0.6 * dist.get_rank())
    assert missing_ranks(seconds=10.0) == []


class DeadStore:
    def __getattr__(self, name: str) -> Any:
        raise dist.DistNetworkError("Connection reset by peer")


def check_store_gone() -> None:
    from megazero.parallel import liveness

    before = liveness._get_default_store
    liveness._get_default_store = DeadStore
    try:
        assert missing_ranks(seconds=1.0) == [0]
    finally:
        liveness._get_default_store = before


def test_missing_ranks(ranks: Any) -> None:
    ranks.run(check_all_there, 3)
    ranks.run(check_one_gone, 3)
    ranks.run(check_late, 2)
    ranks.run(check_store_gone, 2)
