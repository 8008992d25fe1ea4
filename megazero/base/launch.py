"""This process's place among those that were started together, from the environment. Imports no torch.

torchrun gives RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT
(https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables); a process started without a launcher is
rank 0 of 1 and needs no process group. The only file that reads the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megazero.base.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together. Defaults: a plain process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Position among the processes of this machine."""
    local_world_size: int = 1
    """Number of processes on this machine."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Launch:
        """What the launcher wrote. Without RANK and WORLD_SIZE: a plain process; without LOCAL_RANK: one a machine.

        Raises ConfigError when only some of the variables are set, or when they contradict each other.
        """
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            return cls()
        names = ["RANK", "WORLD_SIZE"]
        if "LOCAL_RANK" in environ or "LOCAL_WORLD_SIZE" in environ:
            names += ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]
        launch = cls(*(_whole_number(environ, name, among=names) for name in names))
        for kind, rank, size in (
            ("", launch.rank, launch.world_size),
            ("LOCAL_", launch.local_rank, launch.local_world_size),
        ):
            if not 0 <= rank < size:
                raise ConfigError(
                    f"{kind}RANK={rank} with {kind}WORLD_SIZE={size}: ranks count from 0 to the size - 1. "
                    + _LAUNCH_REMEDY
                )
        if launch.world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
            raise ConfigError(
                f"WORLD_SIZE={launch.world_size} without MASTER_ADDR and MASTER_PORT: ranks meet at that address. "
                + _LAUNCH_REMEDY
            )
        return launch


_LAUNCH_REMEDY = "Start with torchrun, which sets them all, or unset them to run one process."


def _whole_number(environ: Mapping[str, str], name: str, among: list[str]) -> int:
    text = environ.get(name)
    if text is None:
        raise ConfigError(f"the environment has only some of {', '.join(among)}: {name} is not set. {_LAUNCH_REMEDY}")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} in the environment is not a whole number. {_LAUNCH_REMEDY}") from None


def environment() -> dict[str, str]:
    """A copy of this process's environment, for the processes that it starts."""
    return dict(os.environ)


def cpu_threads_for(local_world_size: int, environ: Mapping[str, str] = os.environ) -> int:
    """Threads for one of `local_world_size` ranks that share this machine's usable cores evenly, at least 1.

    OMP_NUM_THREADS wins, except the 1 that torchrun puts there by itself when it starts several ranks.
    """
    asked = environ.get("OMP_NUM_THREADS", "")
    torchruns_own = asked == "1" and local_world_size > 1 and "TORCHELASTIC_RUN_ID" in environ
    if asked.isdigit() and int(asked) > 0 and not torchruns_own:
        return int(asked)
    return max(1, usable_cores() // local_world_size)


_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""cgroup v2's "200000 100000": microseconds of CPU in each period of so many, or "max 100000"."""


def usable_cores() -> int:
    """Cores that this process may run on, within the CPU quota of its container (cgroup v2) if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CPU_QUOTA.exists():
        quota, period = _CPU_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
