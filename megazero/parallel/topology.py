"""Named axes over the ranks, one value passed down.

Rank order: tp fastest, then cp, dp, pp slowest: rank = ((pp · DP + dp) · CP + cp) · TP + tp. Experts see the same ranks
of a stage a second way, (expert_dp, ep) with ep fastest. A group of one member needs no process group, so a single
process is not a special case.

      rank of Topology(pp=2, dp=2, cp=1, tp=2)      tp=0 tp=1
                                        pp=0 dp=0     0    1
                                             dp=1     2    3
                                        pp=1 dp=0     4    5
                                             dp=1     6    7
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megazero.base.errors import ConfigError
from megazero.config.layout import check_world_size
from megazero.parallel.traffic import Traffic

AXES = ("pp", "dp", "cp", "tp")  # slowest first
EXPERT_AXES = ("pp", "expert_dp", "ep")


@dataclass(frozen=True)
class AxisGroup:
    """The ranks that differ from this one only along one axis (or several flattened), in axis order."""

    axis: str
    ranks: tuple[int, ...]
    """Global ranks, in axis order."""
    rank: int
    """This process's position in `ranks`."""
    handle: dist.ProcessGroup | None
    """None for a group of one member, which never communicates."""
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)
    """Where communication over this group is counted: the topology's."""

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __deepcopy__(self, memo: Any) -> AxisGroup:
        return self  # the same ranks, in the copy of a module too


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes and, for this process, its coordinates and groups. Make one with `Topology.build`,
    `Topology.single` or `Topology.fake`."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    """The residual stream is split over tp along the sequence; never true at tp = 1."""
    cp_comm: Literal["p2p", "a2a"] = "p2p"
    """How attention sees the whole sequence: a ring, or an exchange of heads."""
    rank: int = 0
    groups: tuple[AxisGroup, ...] = ()
    """pp, dp, cp, tp, zero (dp and cp flattened: the ranks that hold the same parameters), model (pp and tp flattened:
    one replica of the model), expert_dp, ep, world."""
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)
    """What this rank has handed to the network so far."""
    _subgroups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict, compare=False, repr=False)

    def __deepcopy__(self, memo: Any) -> Topology:
        return self

    def __post_init__(self) -> None:
        _check_at_least_one(**self.sizes)
        if (self.dp * self.cp * self.tp) % self.ep:
            raise ConfigError(
                f"ep={self.ep} must divide dp·cp·tp = {self.dp}·{self.cp}·{self.tp}: experts are spread over the ranks "
                f"of one stage. Choose a divisor of {self.dp * self.cp * self.tp}."
            )

    @property
    def sizes(self) -> dict[str, int]:
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp, "ep": self.ep}

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def coord(self) -> dict[str, int]:
        """This rank's position on each axis, e.g. {"pp": 0, "dp": 1, "cp": 0, "tp": 1}."""
        rest, place = self.rank, {}
        for axis in reversed(AXES):
            rest, place[axis] = divmod(rest, self.sizes[axis])
        return {axis: place[axis] for axis in AXES}

    def size(self, axis: str) -> int:
        return self.group(axis).size

    def group(self, axis: str) -> AxisGroup:
        for group in self.groups:
            if group.axis == axis:
                return group
        raise KeyError(f"no axis {axis!r}; there are {', '.join(g.axis for g in self.groups)}")

    def process_group(self, axis: str) -> dist.ProcessGroup:
        """The group as torch.distributed takes it, a real one also where it has one member.

        Raises RuntimeError while there is no default process group.
        """
        group, whole = self.group(axis), dist.group.WORLD
        if group.handle is not None:
            return group.handle
        if whole is None:
            raise RuntimeError(
                f"the process group of axis {axis}: this process has none. Call init_distributed() first."
            )
        if whole.size() == 1:
            return whole
        if group.ranks not in self._subgroups:
            self._subgroups[group.ranks] = dist.new_group(list(group.ranks), use_local_synchronization=True)
        return self._subgroups[group.ranks]

    def subgroup(self, axis: str, size: int) -> AxisGroup:
        """This rank's block of `size` neighbours along an axis (kv heads shared by some tp ranks, say).

        Only the block's members need to call it, all of them in the same order.
        """
        whole = self.group(axis)
        assert whole.size % size == 0
        first = whole.rank // size * size
        return self.members(axis, tuple(range(first, first + size)))

    def members(self, axis: str, positions: tuple[int, ...]) -> AxisGroup:
        """The ranks at these positions of an axis, this rank among them (the two ends of pp that share an embedding).

        Only the members need to call it, all of them in the same order.
        """
        whole = self.group(axis)
        ranks, handle = tuple(whole.ranks[position] for position in positions), None
        if len(ranks) == whole.size:
            handle = whole.handle
        elif len(ranks) > 1:
            if ranks not in self._subgroups:
                self._subgroups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
            handle = self._subgroups[ranks]
        return AxisGroup(axis, ranks, positions.index(whole.rank), handle, self.traffic)

    @classmethod
    def single(cls) -> Topology:
        """One process, no process group needed."""
        names = ("pp", "dp", "cp", "tp", "zero", "model", "expert_dp", "ep", "world")
        return cls(groups=tuple(AxisGroup(name, (0,), 0, None) for name in names))

    @classmethod
    def build(
        cls,
        *,
        pp: int = 1,
        dp: int | None = None,
        cp: int = 1,
        tp: int = 1,
        ep: int = 1,
        sequence_parallel: bool = False,
        cp_comm: Literal["p2p", "a2a"] = "p2p",
        device_type: str = "cpu",
    ) -> Topology:
        """The topology of the initialised default process group (or of one process if there is none).

        `dp` is what the other axes leave when None. Collective: every rank calls it, with equal sizes.

        Raises ConfigError when the sizes don't multiply to the world size.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        check_world_size(world, pp=pp, cp=cp, tp=tp, dp=dp)
        split = sequence_parallel and tp > 1
        dp = world // (pp * cp * tp)
        shape = cls(pp, dp, cp, tp, ep, sequence_parallel=split, cp_comm=cp_comm, rank=rank)
        if world == 1:
            return cls.single()
        mesh = init_device_mesh(device_type, (pp, shape.dp, cp, tp), mesh_dim_names=AXES)
        expert_dp = shape.dp * cp * tp // ep
        experts = init_device_mesh(device_type, (pp, expert_dp, ep), mesh_dim_names=EXPERT_AXES)
        groups = [
            *(_axis_group(axis, mesh[axis], rank) for axis in AXES),
            _axis_group("zero", mesh["dp", "cp"]._flatten("zero"), rank),
            _axis_group("model", mesh["pp", "tp"]._flatten("model"), rank),
            *(_axis_group(axis, experts[axis], rank) for axis in EXPERT_AXES[1:]),
            AxisGroup("world", tuple(range(world)), rank, dist.group.WORLD),
        ]
        return replace(shape, groups=tuple(replace(group, traffic=shape.traffic) for group in groups))

    @classmethod
    def fake(
        cls,
        world_size: int,
        rank: int = 0,
        *,
        pp: int = 1,
        dp: int | None = None,
        cp: int = 1,
        tp: int = 1,
        ep: int = 1,
        sequence_parallel: bool = False,
        cp_comm: Literal["p2p", "a2a"] = "p2p",
    ) -> Topology:
        """Any world size in one process, over torch's fake process group: collectives return at once, moving nothing.

        For dry runs. End it with `torch.distributed.destroy_process_group()`.
        Raises RuntimeError if a process group is initialised already, ConfigError as `build` does.
        """
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            raise RuntimeError("Topology.fake needs a process without a process group; destroy the present one first")
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            return cls.build(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, sequence_parallel=sequence_parallel, cp_comm=cp_comm)
        except ConfigError:
            dist.destroy_process_group()
            raise


def _check_at_least_one(**sizes: int) -> None:
    problems = [
        f"{axis}={size}: an axis has at least one rank. Give 1 or more." for axis, size in sizes.items() if size < 1
    ]
    if problems:
        raise ConfigError(*problems)


def _axis_group(axis: str, mesh: DeviceMesh, rank: int) -> AxisGroup:
    ranks = tuple(int(r) for r in mesh.mesh.flatten().tolist())
    handle = mesh.get_group() if len(ranks) > 1 else None
    return AxisGroup(axis, ranks, ranks.index(rank), handle)
