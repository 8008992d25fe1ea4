"""Joining the other processes, for scripts: `megazero.init_distributed()` and what `initialize` does by itself."""

from __future__ import annotations

import atexit
from datetime import timedelta

import torch
import torch.distributed as dist

from megazero.base.device import default_backend, device_for, device_type, initialize_distributed, shutdown_distributed
from megazero.base.errors import ConfigError
from megazero.base.launch import Launch, cpu_threads_for

DEFAULT_TIMEOUT = timedelta(minutes=10)


def init_distributed(
    dist_backend: str | None = None,
    timeout: timedelta | float = DEFAULT_TIMEOUT,
    init_method: str | None = None,
    *,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the default process group of the processes that a launcher started; alone, make one of one member.

    Nothing happens when there is a group already. Collective.

    Args:
        dist_backend: "nccl" or "gloo"; by default what fits the device.
        timeout: how long a collective waits for the other ranks; a number is in minutes.
        init_method: where ranks meet, as torch.distributed takes it, with `rank` and `world_size`, instead of what the
            launcher wrote into the environment.

    Raises ConfigError when this machine cannot do it.
    """
    if dist.is_initialized():
        return
    backend = dist_backend or default_backend(device_type())
    if backend == "gloo":
        atexit.register(shutdown_distributed)  # its threads abort a process that ends while they run
    limit = timeout if isinstance(timeout, timedelta) else timedelta(minutes=timeout)
    if init_method is not None:
        if rank < 0 or world_size < 1:
            raise ConfigError(
                f"init_distributed(init_method={init_method!r}) with rank={rank} and world_size={world_size}: an "
                "address needs both. Give them, or leave all three out and start with torchrun."
            )
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=limit)
        return
    launch = Launch.from_environment()
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        return
    initialize_distributed(launch, backend, limit.total_seconds() / 60)
    if device_type() == "cpu":
        torch.set_num_threads(cpu_threads_for(launch.local_world_size))


def join() -> tuple[Launch, torch.device]:
    """This process's place and its device, in the process group if a launcher started several. Collective."""
    launch = Launch.from_environment()
    if launch.world_size > 1:
        init_distributed()
    device = device_for(launch.local_rank, launch.local_world_size)
    if device.type == "cuda" and dist.is_initialized() and dist.get_backend() == "gloo":
        device = torch.device("cpu")
    return launch, device
