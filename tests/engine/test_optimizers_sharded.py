"""Lamb and Muon over slices that cut parameters anywhere: the same weights as one process, and little on the wire."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megazero.base.errors import ConfigError
from megazero.engine.optimizers import Lamb, Muon
from megazero.engine.optimizers.muon import assign_owners
from megazero.engine.sharded import Shard, ShardMap, Span, StepsWhole
from megazero.parallel.topology import Topology
from tests.engine.sliced import BUCKETS, SHAPES, gathered, gradient, shards_of, train_sliced, train_whole, weights

STEPS = 4
FOREIGN = {"exp_avg", "exp_avg_sq", "momentum_buffer"}


def make(kind: str, whole: dict[str, torch.nn.Parameter]) -> Any:
    if kind == "lamb":
        decayed = [p for p in whole.values() if p.dim() > 1]
        rest = [p for p in whole.values() if p.dim() <= 1]
        return Lamb([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": 3e-3}], lr=1e-2, max_coeff=2.0)
    whole["layer.experts"].use_muon = True  # type: ignore[attr-defined]
    return Muon(list(whole.items()), lr=1e-2, weight_decay=0.1, adam_lr=1e-3)


def check_equals_one_process(kind: str) -> None:
    group = Topology.build().group("zero")
    whole, sliced = weights(), weights()
    one, many = make(kind, whole), make(kind, sliced)
    assert isinstance(many, StepsWhole)
    shards = shards_of(many, sliced, group)
    train_whole(one, whole, STEPS)
    train_sliced(many, shards, group, STEPS)
    for name, tensor in gathered(shards, group).items():
        assert not torch.equal(tensor, weights()[name])
        torch.testing.assert_close(tensor, whole[name].detach(), rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["lamb", "muon"])
def test_equals_one_process(ranks: Any, kind: str, size: int) -> None:
    ranks.run(check_equals_one_process, size, kind)


def check_a_rank_without_shards(kind: str) -> None:
    """All of a tiny model may lie in the first slice: the other rank owns padding only, and follows."""
    group = Topology.build().group("zero")
    whole = weights()
    optimizer = make(kind, whole)
    alone = Topology.single().group("zero")
    shards = shards_of(optimizer, whole, alone) if group.rank == 0 else []
    train_sliced(optimizer, shards, group, 2)
    one = weights()
    train_whole(make(kind, one), one, 2)
    for shard in shards:
        torch.testing.assert_close(shard.tensor, one[shard.name].detach().flatten(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["lamb", "muon"])
def test_a_rank_without_shards(ranks: Any, kind: str) -> None:
    ranks.run(check_a_rank_without_shards, 2, kind)


def check_resumed(kind: str) -> None:
    """States are all that a step needs: a new optimizer with the old states goes on as the old one does."""
    group = Topology.build().group("zero")
    whole = weights()
    old, new = make(kind, whole), make(kind, weights())
    shards = shards_of(old, whole, group)
    train_sliced(old, shards, group, 2)
    for shard in shards:  # as loading a checkpoint does, which knows one list of names
        shard.state |= {} if kind == "lamb" else {k: torch.zeros(0) for k in (FOREIGN - set(shard.state))}
    copies = [
        Shard(
            s.name,
            s.shape,
            s.start,
            s.stop,
            s.tensor.clone(),
            s.grad,
            s.group,
            {k: v.clone() for k, v in s.state.items()},
        )
        for s in shards
    ]
    train_sliced(old, shards, group, 2, first=2)
    train_sliced(new, copies, group, 2, first=2)
    states = [{"exp_avg", "exp_avg_sq", "step"}, {"momentum_buffer", "step"}]
    assert all(set(shard.state) == states[shard.group.get("use_muon", False)] for shard in copies)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(shards, copies, strict=True))


@pytest.mark.parametrize("kind", ["lamb", "muon"])
def test_resumed(ranks: Any, kind: str) -> None:
    ranks.run(check_resumed, 2, kind)


@pytest.mark.parametrize("kind", ["lamb", "muon"])
def test_empty_shards_and_parameters_are_passed_over(kind: str) -> None:
    group = Topology.single().group("zero")
    whole, one = weights(), weights()
    optimizer = make(kind, whole)
    shards = shards_of(optimizer, whole, group)
    empty = shards[1]
    extra = Shard(empty.name, empty.shape, 3, 3, empty.tensor[:0], empty.tensor[:0], empty.group)
    optimizer.step_sharded([extra, *shards], group)
    optimizer.step_sharded(shards, group)
    nothing = torch.nn.Parameter(torch.zeros(0, 3))
    nothing.grad = torch.zeros(0, 3)
    other = make(kind, one | {"nothing": nothing})
    train_whole(other, one, 1)


def check_in_parts(kind: str) -> None:
    """One bucket after the other is the same as both at once, and a part may be empty."""
    group = Topology.build().group("zero")
    whole, other = weights(), weights()
    one, many = make(kind, whole), make(kind, other)
    shards = shards_of(many, other, group)
    train_whole(one, whole, 2)
    for step in range(2):
        for part, names in enumerate(BUCKETS):
            held = [shard for shard in shards if shard.name in names]
            for shard in held:
                shard.grad = gradient(shard.name, step).flatten()[shard.start : shard.stop].clone()
            many.step_sharded(held, group, part=part)
    for name, tensor in gathered(shards, group).items():
        torch.testing.assert_close(tensor, whole[name].detach(), rtol=0, atol=1e-6, msg=name)
    many.step_sharded([], group, part="empty")
    many.step_sharded([], group, part="empty too")


@pytest.mark.parametrize("kind", ["lamb", "muon"])
def test_in_parts(ranks: Any, kind: str) -> None:
    ranks.run(check_in_parts, 2, kind)


def check_wire() -> None:
    topology = Topology.build()
    group = topology.group("zero")
    for kind in ("lamb", "muon"):
        whole = weights()
        optimizer = make(kind, whole)
        shards = shards_of(optimizer, whole, group)
        before = topology.traffic.totals()
        train_sliced(optimizer, shards, group, 1)
        sent = topology.traffic.since(before)
        if kind == "lamb":  # two numbers a parameter, in fp64
            (count,) = sent.values()
            assert count.calls == 1 and count.bytes == 2 * len(SHAPES) * 8 * 2 * (group.size - 1) / group.size
        else:  # cut matrices, to their owners and back, in 2 bytes
            places = ShardMap.exchange([shard for shard in shards if shard.group["use_muon"]], group)
            owners = assign_owners(places)
            away = sum(
                part.numel
                for name, held in places.places.items()
                for rank, part in held
                if rank != owners[name] and group.rank in (rank, owners[name])
            )
            assert away > 0
            assert sum(c.calls for c in sent.values()) == 2 and sum(c.bytes for c in sent.values()) == 2 * away


def test_wire(ranks: Any) -> None:
    ranks.run(check_wire, 2)


def span(name: str, shape: tuple[int, ...], start: int, stop: int) -> Span:
    return Span(name, shape, start, stop)


def test_owners_hold_a_part_and_share_the_work() -> None:
    square = (8, 8)
    places = ShardMap(
        [
            [span("a", square, 0, 64), span("b", square, 0, 10)],
            [span("b", square, 10, 64), span("c", square, 0, 32)],
            [span("c", square, 32, 64), span("d", square, 0, 64)],
        ]
    )
    assert assign_owners(places) == {"a": 0, "d": 2, "b": 1, "c": 1}
    places = ShardMap([[span("a", square, 0, 20)], [span("a", square, 20, 64)]])
    assert assign_owners(places) == {"a": 0}


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[span("w", (4,), 0, 2)], [span("w", (4,), 3, 4)]], "elements 2 to 3 of w"),
        ([[span("w", (4,), 0, 2)], [span("w", (4,), 1, 4)]], "elements 2 to 1 of w"),
        ([[span("w", (4,), 0, 2)], []], "the shards of w .* end at element 2"),
        ([[span("w", (4,), 0, 4)], [span("w", (5,), 4, 5)]], r"w is \(5,\) on one rank and \(4,\)"),
    ],
)
def test_ranges_must_tile(spans: list[list[Span]], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        ShardMap(spans)


@pytest.mark.parametrize("kind", ["lamb", "muon"])
def test_tensor_parallelism_is_refused(kind: str) -> None:
    group = Topology.single().group("zero")
    whole = weights()
    optimizer = make(kind, whole)
    shards = shards_of(optimizer, whole, group)
    for shard in shards:
        shard.split = shard.name.startswith("layer.b")
    with pytest.raises(ConfigError, match=r"splits 1 of them, the first is layer.b.weight.*or take an element-wise"):
        optimizer.step_sharded(shards, group)


@pytest.mark.parametrize("kind", ["lamb", "muon"])
def test_shards_stay_as_they_were(kind: str) -> None:
    group = Topology.single().group("zero")
    whole = weights()
    optimizer = make(kind, whole)
    shards = shards_of(optimizer, whole, group)
    train_sliced(optimizer, shards, group, 1)
    with pytest.raises(AssertionError, match="the shards of part None have changed"):
        optimizer.step_sharded(shards[:3], group)
