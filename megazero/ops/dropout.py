"""Dropout whose mask is a hash of where an element is in the logical run, not of which rank computes it.

    keep(element) = hash(seed, step, site, sample index in the global batch, logical position) ≥ p · 2³²

so any layout, any micro-batch size and any recomputation drops the same elements. The hash is a chain of the 32-bit
finaliser "lowbias32" (Wellons, hash-prospector), evaluated in int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Randomness:
    """What dropout needs to know of the run at this moment."""

    seed: int
    step: int
    sample: Tensor
    """Index of each sample within its global batch, int64 [b]."""

    def key(self, site: str) -> int:
        """A number for this seed, step and place in the model (a logical module name)."""
        mixed = _mix(torch.tensor(self.seed & _MASK))
        mixed = _mix(mixed ^ (self.step & _MASK))
        return int(_mix(mixed ^ crc32(site.encode())))


def dropout(x: Tensor, rate: float, key: int, coordinates: list[Tensor]) -> Tensor:
    """Zero elements of x with probability `rate` and scale the others by 1 / (1 - rate).

    Args:
        key: `Randomness.key(site)`.
        coordinates: int64 tensors that broadcast to x's shape; together they name an element of the logical tensor
            (sample, position, channel): one per dim is usual.
    """
    if rate == 0.0:
        return x
    bits = hashed(key, coordinates, x.device)
    return torch.where(bits >= int(rate * 2**32), x / (1.0 - rate), torch.zeros((), dtype=x.dtype, device=x.device))


def hashed(key: int, coordinates: list[Tensor], device: torch.device) -> Tensor:
    """32 random bits for each element that the coordinates name (int64 tensors that broadcast): int64 of that shape."""
    bits = torch.tensor(key, device=device)
    for coordinate in coordinates:
        bits = _mix(bits ^ (coordinate.to(device) & _MASK))
    return bits


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _MASK  # int64 products wrap; their low 32 bits are right
    x = (x ^ (x >> 15)) * 0xD35A2D97 & _MASK
    return x ^ (x >> 15)
