"""A logical tensor of which this rank holds some boxes, in the shape that torch.distributed.checkpoint understands.

logical (4, 3)      flat slice [2, 10) of it = three boxes, each a view of local memory
  . . 0               Box((0, 2), (1, 1)) -> memory[0:1]
  1 2 3               Box((1, 0), (2, 3)) -> memory[1:7]
  4 5 6
  7 . .               Box((3, 0), (1, 1)) -> memory[7:8]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megazero.parallel.sharding import Box


@dataclass(frozen=True)
class Piece:
    """One box of a logical tensor and the local memory that is saved from, or loaded into."""

    name: str
    """Logical name; several pieces of one rank may carry it."""
    shape: tuple[int, ...]
    """Shape of the logical tensor."""
    box: Box
    tensor: Tensor
    """A view of shape `box.shape`, on any device, contiguous or not."""

    def __post_init__(self) -> None:
        assert tuple(self.tensor.shape) == self.box.shape, f"{self.name}: memory {self.tensor.shape} for {self.box}"
        assert len(self.shape) == len(self.box.shape), f"{self.name}: {self.box} of a tensor of shape {self.shape}"


class BoxedTensor(Tensor):
    """Reports the logical size and holds only some boxes of it. It carries data to and from a checkpoint; no operation
    is defined on it. A Tensor subclass because the checkpoint's planner looks for its three methods on tensors only.
    """

    pieces: tuple[Piece, ...]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, pieces: Sequence[Piece]) -> BoxedTensor:
        first = pieces[0]
        return torch.Tensor._make_wrapper_subclass(
            cls, first.shape, dtype=first.tensor.dtype, device=first.tensor.device
        )

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"BoxedTensor({self.pieces[0].name}, {tuple(self.size())}, boxes={[p.box for p in self.pieces]})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} on a BoxedTensor: it only carries boxes to and from a checkpoint")

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(p.box.offset), torch.Size(p.box.shape)) for p in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The memory of the box at `index.offset`. `index.index` tells boxes of one offset apart when loading; when
        saving it counts over all ranks, so that it is believed only where the offset agrees."""
        hint = index.index
        if hint is not None and hint < len(self.pieces) and self.pieces[hint].box.offset == index.offset:
            return self.pieces[hint].tensor
        for piece in self.pieces:
            if piece.box.offset == index.offset:
                return piece.tensor
        raise KeyError(f"{index.fqn}: no box at {index.offset} here")


def boxed_state(pieces: Sequence[Piece]) -> dict[str, BoxedTensor]:
    """The state dict of these pieces: name -> BoxedTensor, sorted by name. Pieces without elements are left out.

    The pieces of one name must agree in shape and dtype.
    """
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        if math.prod(piece.shape) and piece.box.numel:
            local = Piece(piece.name, piece.shape, piece.box, piece.tensor.detach())
            by_name.setdefault(piece.name, []).append(local)
    for name, group in by_name.items():
        kinds = {(piece.shape, piece.tensor.dtype) for piece in group}
        assert len(kinds) == 1, f"pieces of {name} disagree in shape or dtype: {kinds}"
    return {name: BoxedTensor(by_name[name]) for name in sorted(by_name)}
