"""`deepspeed.comm`: torch.distributed, where a process without a launcher is rank 0 of 1."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megazero.base.launch import Launch
from megazero.engine import distributed


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """`megazero.init_distributed`: join the processes that a launcher started; alone, make a group of one.

    `dist_init_required=False` leaves it to the script. The launcher's variables say who and where the others are, so
    that there is no MPI to discover (`auto_mpi_discovery`, `distributed_port`) and nothing to tell (`verbose`,
    `config`).
    """
    if dist_init_required is not False:
        limit = distributed.DEFAULT_TIMEOUT if timeout is None else timeout
        distributed.init_distributed(dist_backend, limit, init_method, rank=rank, world_size=world_size)


def get_rank(group: Any = None) -> int:
    """This process's rank in the group (-1: it is no member), or among all."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def get_world_size(group: Any = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_local_rank() -> int:
    """This process's number on its machine."""
    return Launch.from_environment().local_rank


def barrier(*args: Any, **kwargs: Any) -> Any:
    """Wait for all ranks."""
    return dist.barrier(*args, **kwargs) if dist.is_initialized() else None
