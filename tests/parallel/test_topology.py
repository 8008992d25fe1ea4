"""Rank order and groups of every axis against a written-out table, over fake groups and over real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megazero.base.errors import ConfigError
from megazero.parallel.topology import AxisGroup, Topology
from tests.harness import Ranks

# All groups of each axis, written out. tp is fastest, then cp, dp, pp; ep is fastest among the experts' axes.
EIGHT: dict[str, Any] = {
    "sizes": {"pp": 2, "cp": 1, "tp": 2, "ep": 2},
    "pp": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "dp": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "cp": [[0], [1], [2], [3], [4], [5], [6], [7]],
    "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "zero": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "model": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "expert_dp": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "ep": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "world": [[0, 1, 2, 3, 4, 5, 6, 7]],
}
SIXTEEN: dict[str, Any] = {
    "sizes": {"pp": 2, "cp": 2, "tp": 2, "ep": 4},
    "pp": [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]],
    "dp": [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]],
    "cp": [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]],
    "tp": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]],
    "zero": [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]],
    "model": [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]],
    "expert_dp": [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]],
    "ep": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    "world": [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]],
}
# Experts over more ranks than tp has: ep = 3 cuts across dp and tp.
SIX: dict[str, Any] = {
    "sizes": {"pp": 1, "cp": 1, "tp": 2, "ep": 3},
    "pp": [[0], [1], [2], [3], [4], [5]],
    "dp": [[0, 2, 4], [1, 3, 5]],
    "cp": [[0], [1], [2], [3], [4], [5]],
    "tp": [[0, 1], [2, 3], [4, 5]],
    "zero": [[0, 2, 4], [1, 3, 5]],
    "model": [[0, 1], [2, 3], [4, 5]],
    "expert_dp": [[0, 3], [1, 4], [2, 5]],
    "ep": [[0, 1, 2], [3, 4, 5]],
    "world": [[0, 1, 2, 3, 4, 5]],
}
COORDINATES_OF_SIXTEEN = {  # rank: pp, dp, cp, tp
    0: (0, 0, 0, 0),
    1: (0, 0, 0, 1),
    2: (0, 0, 1, 0),
    3: (0, 0, 1, 1),
    4: (0, 1, 0, 0),
    7: (0, 1, 1, 1),
    8: (1, 0, 0, 0),
    13: (1, 1, 0, 1),
    14: (1, 1, 1, 0),
    15: (1, 1, 1, 1),
}


def fake_topologies(world_size: int, sizes: dict[str, int]) -> list[tuple[dict[str, int], dict[str, Any]]]:
    """Coordinates and groups as each rank of a world would see them, one after the other in one process."""
    seen = []
    for rank in range(world_size):
        topology = Topology.fake(world_size, rank, **sizes)
        groups = {g.axis: (list(g.ranks), g.rank, g.handle is None) for g in topology.groups}
        seen.append((topology.coord, groups))
        dist.destroy_process_group()
    return seen


@pytest.mark.parametrize("table", [SIX, EIGHT, SIXTEEN], ids=["6", "8", "16"])
def test_groups_equal_the_table(ranks: Ranks, table: dict[str, Any]) -> None:
    axes = [axis for axis in table if axis != "sizes"]
    world_size = len(table["world"][0])
    ((*seen,),) = ranks.run(fake_topologies, 1, world_size, table["sizes"])
    for rank, (_, groups) in enumerate(seen):
        assert list(groups) == axes
        for axis in axes:
            (wanted,) = [members for members in table[axis] if rank in members]
            found, position, without_handle = groups[axis]
            assert (axis, rank, found) == (axis, rank, wanted)
            assert wanted[position] == rank
            assert without_handle == (len(wanted) == 1)


def test_coordinates_equal_the_table(ranks: Ranks) -> None:
    ((*seen,),) = ranks.run(fake_topologies, 1, 16, SIXTEEN["sizes"])
    for rank, wanted in COORDINATES_OF_SIXTEEN.items():
        assert seen[rank][0] == dict(zip(("pp", "dp", "cp", "tp"), wanted, strict=True))


def fake_512() -> dict[str, tuple[int, int]]:
    topology = Topology.fake(512, rank=77, pp=4, cp=2, tp=8, ep=4, cp_comm="a2a")
    assert topology.cp_comm == "a2a"
    dist.all_reduce(torch.ones(1), group=topology.group("dp").handle)  # moves nothing, returns at once
    return {g.axis: (g.size, g.rank) for g in topology.groups}


def test_fake_world_of_512_ranks(ranks: Ranks) -> None:
    # 77 = ((0 · 8 + 4) · 2 + 1) · 8 + 5
    (seen,) = ranks.run(fake_512, 1)
    assert seen["pp"] == (4, 0)
    assert seen["dp"] == (8, 4)
    assert seen["cp"] == (2, 1)
    assert seen["tp"] == (8, 5)
    assert seen["zero"] == (16, 9)
    assert seen["model"] == (32, 5)
    assert seen["ep"] == (4, 77 % 4)
    assert seen["expert_dp"] == (32, 77 // 4)
    assert seen["world"] == (512, 77)


def fake_twice() -> None:
    Topology.fake(4)
    with pytest.raises(RuntimeError, match="needs a process without a process group"):
        Topology.fake(4)


def fake_with_bad_sizes(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Topology.fake(8, **sizes)
    assert not dist.is_initialized()


def test_fake_leaves_other_groups_alone(ranks: Ranks) -> None:
    ranks.run(fake_twice, 1)


def sums_over_groups(sizes: dict[str, int]) -> dict[str, int]:
    """The sum of global ranks over each of this rank's groups."""
    topology = Topology.build(**sizes)  # type: ignore[arg-type]
    assert topology.rank == dist.get_rank()
    return {group.axis: sum_over(group, dist.get_rank()) for group in topology.groups}


def sum_over(group: AxisGroup, value: int) -> int:
    total = torch.tensor(value)
    if group.size > 1:
        dist.all_reduce(total, group=group.handle)
    return int(total)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        # by rank: the sum of the ranks in its group
        ({"tp": 2}, {"tp": [1, 1, 5, 5], "dp": [2, 4, 2, 4], "zero": [2, 4, 2, 4], "model": [1, 1, 5, 5]}),
        ({"cp": 2}, {"cp": [1, 1, 5, 5], "dp": [2, 4, 2, 4], "zero": [6, 6, 6, 6], "model": [0, 1, 2, 3]}),
        ({"pp": 2, "tp": 2}, {"tp": [1, 1, 5, 5], "pp": [2, 4, 2, 4], "zero": [0, 1, 2, 3], "model": [6, 6, 6, 6]}),
        ({"ep": 2}, {"ep": [1, 1, 5, 5], "expert_dp": [2, 4, 2, 4], "dp": [6, 6, 6, 6], "world": [6, 6, 6, 6]}),
    ],
    ids=["tp2dp2", "cp2dp2", "pp2tp2", "dp4ep2"],
)
def test_real_groups_reduce_over_the_right_ranks(
    ranks: Ranks, sizes: dict[str, int], wanted: dict[str, list[int]]
) -> None:
    results = ranks.run(sums_over_groups, 4, sizes)
    for axis, sums in wanted.items():
        assert [result[axis] for result in results] == sums, axis


def sums_over_subgroups() -> tuple[int, int, int, int]:
    topology = Topology.build(tp=4)
    pair = topology.subgroup("tp", 2)
    again = topology.subgroup("tp", 2)
    assert pair.handle is again.handle
    alone, everyone = topology.subgroup("tp", 1), topology.subgroup("tp", 4)
    assert alone.handle is None
    assert everyone == topology.group("tp")
    assert alone.ranks == (dist.get_rank(),)
    return (*pair.ranks, pair.rank, sum_over(pair, dist.get_rank()))


def test_subgroup_is_the_block_of_neighbours(ranks: Ranks) -> None:
    assert ranks.run(sums_over_subgroups, 4) == [(0, 1, 0, 1), (0, 1, 1, 1), (2, 3, 0, 5), (2, 3, 1, 5)]


def test_single_process_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    for topology in (Topology.single(), Topology.build()):
        assert topology.world_size == 1
        assert topology.coord == {"pp": 0, "dp": 0, "cp": 0, "tp": 0}
        assert [group.axis for group in topology.groups] == [axis for axis in EIGHT if axis != "sizes"]
        for group in topology.groups:
            assert group == AxisGroup(group.axis, (0,), 0, None)
    assert Topology.single().size("tp") == 1


def test_unknown_axis_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match="no axis 'tpp'; there are pp, dp, cp, tp, zero, model, expert_dp, ep, world"):
        Topology.single().group("tpp")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp": 3}, "world size 8 does not fit tp·pp·cp = 3·1·1 = 3: .* Start 6 or 9 ranks"),
        ({"tp": 2, "dp": 3}, "world size 8 does not fit tp·pp·cp = 2·1·1 = 2 times dp = 3: .* Start 6 ranks"),
        ({"cp": 0}, "tp 1, pp 1, cp 0: each is a whole number >= 1"),
        ({"ep": 0}, "ep=0: an axis has at least one rank. Give 1 or more."),
        ({"tp": 2, "ep": 3}, "ep=3 must divide dp·cp·tp = 4·1·2: .* Choose a divisor of 8"),
    ],
)
def test_sizes_that_do_not_fit_the_world(ranks: Ranks, sizes: dict[str, int], words: str) -> None:
    ranks.run(fake_with_bad_sizes, 1, sizes, words)


def test_all_bad_sizes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Topology(pp=0, tp=-1)
    assert len(caught.value.problems) == 2
    assert "pp=0" in caught.value.problems[0]
    assert "tp=-1" in caught.value.problems[1]


def test_experts_must_fit_a_stage() -> None:
    with pytest.raises(ConfigError) as caught:
        Topology(pp=2, dp=2, tp=2, ep=8)
    assert str(caught.value) == (
        "ep=8 must divide dp·cp·tp = 2·1·2: experts are spread over the ranks of one stage. Choose a divisor of 4."
    )


def build_too_large() -> None:
    with pytest.raises(ConfigError, match="world size 2 does not fit tp·pp·cp = 4·1·1 = 4"):
        Topology.build(tp=4)


def test_build_checks_the_real_world_size(ranks: Ranks) -> None:
    ranks.run(build_too_large, 2)
