"""Page-aligned memory for O_DIRECT, and a bounded pool of it.

Direct IO asks that memory address, file offset and length are multiples of a page. Buffers are whole anonymous mappings
(or pinned memory, which is aligned too), are lent out as flat tensors of any type, and go back to the pool for the next
borrower, so that a step that touches a hundred buckets allocates only as many buffers as it holds at one time.
"""

from __future__ import annotations

import mmap
from collections import defaultdict

import torch
from torch import Tensor

ALIGNMENT = 4096
"""Bytes; serves every device and file system (many would do with 512)."""


def round_up(nbytes: int, multiple: int = ALIGNMENT) -> int:
    """The smallest multiple that is not smaller."""
    return -(-nbytes // multiple) * multiple


def aligned_bytes(nbytes: int, pin_memory: bool = False) -> Tensor:
    """A flat uint8 tensor that starts at a page; `nbytes` is a positive multiple of a page.

    Fresh mappings hold no memory until they are touched. Pinned memory comes from torch's own cache of it.
    """
    if pin_memory:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)  # the tensor keeps the mapping alive


def is_aligned(tensor: Tensor) -> bool:
    """Whether direct IO may use this memory."""
    return tensor.data_ptr() % ALIGNMENT == 0


def size_class(nbytes: int) -> int:
    """Bytes that a buffer for `nbytes` really has: one of eight sizes to each power of two, so that buckets of about
    one size share buffers and at most an eighth is unused."""
    nbytes = max(nbytes, ALIGNMENT)
    return round_up(nbytes, max(ALIGNMENT, 1 << (nbytes.bit_length() - 4)))


class AlignedPool:
    """Lends flat tensors, and keeps at most `keep` idle buffers of each size class; the rest are freed."""

    def __init__(self, keep: int, pin_memory: bool = False) -> None:
        self.keep, self.pin_memory = keep, pin_memory
        self._idle: dict[int, list[Tensor]] = defaultdict(list)
        self._lent: dict[int, Tensor] = {}  # by address

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A page-aligned tensor (numel,), values undefined."""
        size = size_class(numel * dtype.itemsize)
        memory = self._idle[size].pop() if self._idle[size] else aligned_bytes(size, self.pin_memory)
        self._lent[memory.data_ptr()] = memory
        return memory[: numel * dtype.itemsize].view(dtype)

    def give_back(self, tensor: Tensor) -> None:
        """Return a tensor that `take` lent (or a view of it from its first element)."""
        memory = self._lent.pop(tensor.data_ptr(), None)
        assert memory is not None, "internal error: a buffer was released that this pool has not lent"
        idle = self._idle[memory.numel()]
        if len(idle) < self.keep:
            idle.append(memory)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, lent and idle."""
        return sum(m.numel() for m in self._lent.values()) + sum(
            m.numel() for kept in self._idle.values() for m in kept
        )

    def clear(self) -> None:
        """Free the idle buffers."""
        self._idle.clear()
