"""Initial values that do not depend on the layout.

Each parameter has a generator of its own, seeded by the crc32 of (seed, logical name): torch's CPU generator reads no
more than 32 bits. The logical tensor is drawn from it on the CPU, whatever the device, and each rank keeps its boxes.
"""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor

from megazero.parallel.sharding import ShardSpec


def initial_values(spec: ShardSpec, seed: int) -> Tensor:
    """The parameter's initial values on this rank: fp32, local shape."""
    if spec.init_std is None:
        return torch.full(spec.local_shape, spec.init_fill)
    generator = torch.Generator().manual_seed(crc32(f"{seed} {spec.name}".encode()))
    logical = torch.empty(spec.shape).normal_(0.0, spec.init_std, generator=generator)
    return spec.local(logical).clone()
