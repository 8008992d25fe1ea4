"""DeepSpeed's ProcessTopology: ranks as coordinates on named axes, the last axis fastest. Arithmetic, no processes.

ProcessTopology(["pipe", "data"], [2, 2])      data=0 data=1
                                  pipe=0          0     1
                                  pipe=1          2     3
"""

from __future__ import annotations

import itertools
import math
from collections import namedtuple
from collections.abc import Collection, Sequence
from typing import Any

from megazero.base.errors import ConfigError


class ProcessTopology:
    """The ranks 0 … product of `dims` - 1, each at one coordinate of `axes`."""

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims) or len(set(axes)) < len(axes) or min(dims, default=0) < 1:
            raise ConfigError(
                f"ProcessTopology(axes={list(axes)}, dims={list(dims)}): each axis has one name and one size of 1 or "
                "more. Give as many sizes as names."
            )
        self.axes, self.dims = list(axes), list(dims)
        self.ProcessCoord: Any = namedtuple("ProcessCoord", self.axes)
        places = itertools.product(*map(range, self.dims))
        self.mapping: dict[Any, int] = {self.ProcessCoord(*place): rank for rank, place in enumerate(places)}

    def world_size(self) -> int:
        return math.prod(self.dims)

    def get_axis_names(self) -> list[str]:
        return self.axes

    def get_dim(self, axis: str) -> int:
        """Ranks along an axis; 0 if there is no such axis."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_rank(self, **coord: int) -> int:
        """The rank at a coordinate, which names every axis. Raises ValueError for another."""
        if set(coord) != set(self.axes) or (place := self.ProcessCoord(**coord)) not in self.mapping:
            raise ValueError(
                f"get_rank({_words(coord)}): a rank has a coordinate on each axis of {_words(self._sizes())}, from 0 "
                "and below its size. For all ranks that match some of them ask filter_match()."
            )
        return self.mapping[place]

    def get_coord(self, rank: int) -> Any:
        """A rank's coordinate, a named tuple. Raises ValueError for a rank that there is not."""
        if not 0 <= rank < self.world_size():
            raise ValueError(f"get_coord({rank}): there are ranks 0 to {self.world_size() - 1}. Give one of them.")
        return list(self.mapping)[rank]

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """The ranks that differ along this axis alone, list by list; [] if there is no such axis."""
        groups: dict[tuple[int, ...], list[int]] = {}
        at = self.axes.index(axis) if axis in self.axes else None
        for place, rank in self.mapping.items() if at is not None else ():
            groups.setdefault(place[:at] + place[at + 1 :], []).append(rank)
        return list(groups.values())

    def filter_match(self, **coord: int) -> list[int]:
        """The ranks at these coordinates; axes that are not named may be anything. Raises ValueError for no axis."""
        if not set(coord) <= set(self.axes):
            raise ValueError(f"filter_match({_words(coord)}): the axes are {', '.join(self.axes)}. Name these.")
        return [rank for place, rank in self.mapping.items() if coord.items() <= place._asdict().items()]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks at `idx` of an axis."""
        return self.filter_match(**{axis: idx})

    def get_rank_repr(
        self, rank: int, omit_axes: Collection[str] = ("data", "pipe"), inner_sep: str = "_", outer_sep: str = "-"
    ) -> str:
        """A rank's coordinate in words for a file's name, `model_01`."""
        place = self.get_coord(rank)._asdict()
        return outer_sep.join(f"{axis}{inner_sep}{at:02d}" for axis, at in place.items() if axis not in omit_axes)

    def _sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.dims, strict=True))


def _words(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name}={number}" for name, number in numbers.items())
