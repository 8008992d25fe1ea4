"""Which part of a logical tensor a rank holds: Box, ShardSpec, and the boxes of a flat slice.

A logical tensor is the whole, unsharded one. A rank's local tensor is one or more boxes of it, stacked along dim 0.
ZeRO cuts the flattened local tensor into slices; `flat_slice_boxes` gives a slice's boxes, so that saving, loading,
initialising, clipping and gradient reduction need only this file and mention no rank layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megazero.parallel.topology import AxisGroup


@dataclass(frozen=True)
class Box:
    """A rectangular part of a logical tensor: `offset[d] <= index[d] < offset[d] + shape[d]` for each dim d."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def of(self, logical: Tensor) -> Tensor:
        """The view of `logical` that this box covers."""
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            logical = logical.narrow(dim, start, length)
        return logical


@dataclass(frozen=True)
class ShardSpec:
    """What a rank's parameter is, layout aside. Save, load, init, clip and gradient sync ask only this."""

    name: str
    """Logical name, the same on every layout; Hugging Face's where the family has one."""
    shape: tuple[int, ...]
    """Shape of the logical tensor."""
    boxes: tuple[Box, ...]
    """The parts held here; the local tensor is these, concatenated along dim 0."""
    replicas: tuple[int, ...] = (0,)
    """Global ranks at these data-parallel coordinates that hold equal boxes; the first owns them for clip and save."""
    grad_sum: AxisGroup | None = None
    """Ranks over which this parameter's gradient is partial and must be summed (data parallelism aside)."""
    init_std: float | None = field(default=None)
    """Initial values: normal with this deviation; `init_fill` when None."""
    init_fill: float = 0.0
    """Initial value when `init_std` is None."""
    copies: AxisGroup | None = None
    """Ranks that hold the data-parallel copies, over which ZeRO shards it; None: topology's "zero". Experts that are
    spread over ranks have fewer copies."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        if len(self.boxes) == 1:
            return self.boxes[0].shape
        return (sum(box.shape[0] for box in self.boxes), *self.boxes[0].shape[1:])

    def owned_by(self, rank: int) -> bool:
        return rank == self.replicas[0]

    def local(self, logical: Tensor) -> Tensor:
        """Cut this rank's part out of the whole logical tensor."""
        parts = [box.of(logical) for box in self.boxes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def whole(name: str, shape: tuple[int, ...]) -> ShardSpec:
    """The spec of a parameter that is not split: one box, the whole tensor."""
    return ShardSpec(name, tuple(shape), (Box((0,) * len(shape), tuple(shape)),))


def split(dim: int, shape: tuple[int, ...], part: int, parts: int) -> Box:
    """The part-th of `parts` equal boxes of a tensor of this shape, cut along `dim`."""
    assert shape[dim] % parts == 0, f"dim {dim} of {shape} does not divide into {parts}"
    length = shape[dim] // parts
    offset = tuple(part * length if d == dim else 0 for d in range(len(shape)))
    return Box(offset, tuple(length if d == dim else n for d, n in enumerate(shape)))


def has_spec(parameter: nn.Parameter) -> bool:
    """Whether the parameter says itself what part of it is here."""
    return getattr(parameter, "shard_spec", None) is not None


def spec_of(name: str, parameter: nn.Parameter) -> ShardSpec:
    """The parameter's own spec, or that of an unsplit tensor for modules that know nothing of megazero."""
    spec = getattr(parameter, "shard_spec", None)
    return spec if spec is not None else whole(name, tuple(parameter.shape))


def flat_slice_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[int, Box]]:
    """Boxes that tile elements [start, stop) of a row-major tensor, each with its offset from `start`.

    A slice of an n-dim tensor is at most 2n - 1 boxes: a partial head and tail at each level around whole rows.

    >>> for at, box in flat_slice_boxes((4, 3), 2, 10):  # head of row 0, rows 1-2, tail of row 3
    ...     print(at, box.offset, box.shape)
    0 (0, 2) (1, 1)
    1 (1, 0) (2, 3)
    7 (3, 0) (1, 1)
    """
    if start >= stop:
        return []
    if len(shape) == 0:
        return [(0, Box((), ()))]
    if len(shape) == 1:
        return [(0, Box((start,), (stop - start,)))]
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:  # inside one row
        return [(at, _in_row(first, box)) for at, box in flat_slice_boxes(shape[1:], head, tail)]
    pieces: list[tuple[int, Box]] = []
    if head:
        pieces += [(at, _in_row(first, box)) for at, box in flat_slice_boxes(shape[1:], head, row)]
        first += 1
    if first < last:
        whole_rows = Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
        pieces.append((first * row - start, whole_rows))
    pieces += [(last * row - start + at, _in_row(last, box)) for at, box in flat_slice_boxes(shape[1:], 0, tail)]
    return pieces


def _in_row(row: int, box: Box) -> Box:
    return Box((row, *box.offset), (1, *box.shape))


def spec_slice_boxes(spec: ShardSpec, start: int, stop: int) -> list[tuple[int, Box]]:
    """Logical boxes of elements [start, stop) of the flattened local tensor, each with its offset from `start`."""
    pieces: list[tuple[int, Box]] = []
    base = 0  # flat position of this box in the local tensor
    for box in spec.boxes:
        lo, hi = max(start - base, 0), min(stop - base, box.numel)
        if lo < hi:
            for at, part in flat_slice_boxes(box.shape, lo, hi):
                offset = tuple(a + b for a, b in zip(box.offset, part.offset, strict=True))
                pieces.append((base + lo - start + at, Box(offset, part.shape)))
        base += box.numel
    return pieces
