"""Parts of unequal sizes, empty ones too, reach the ranks they are for, and are counted."""

from __future__ import annotations

from typing import Any

import torch

from megazero.parallel.exchange import exchange_parts, wire_device
from megazero.parallel.topology import Topology


def size_of(source: int, target: int) -> int:
    return (source * 3 + target * 2) % 5


def check_exchange() -> None:
    topology = Topology.build()
    group = topology.group("zero")
    before = topology.traffic.totals()
    outgoing = [torch.full((size_of(group.rank, r),), 10.0 * group.rank + r) for r in range(group.size)]
    lengths = [size_of(r, group.rank) for r in range(group.size)]
    parts = exchange_parts(outgoing, lengths, group)
    for source, part in enumerate(parts):
        assert torch.equal(part, torch.full((size_of(source, group.rank),), 10.0 * source + group.rank))
    sent = sum(size_of(group.rank, r) for r in range(group.size) if r != group.rank)
    assert sum(count.bytes for count in topology.traffic.since(before).values()) == 4 * sent
    assert wire_device(group, torch.device("cpu")) == torch.device("cpu")


def test_exchange(ranks: Any) -> None:
    ranks.run(check_exchange, 3)


def test_alone_nothing_moves() -> None:
    part = torch.ones(3)
    assert exchange_parts([part], [3], Topology.single().group("zero"))[0] is part
