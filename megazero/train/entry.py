"""The way in and out of a training process: errors become one clear message and an exit status.

0 done or stopped as asked · 1 failed while running (a dry run: does not fit)
2 the settings, the data or the checkpoint cannot work
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from megazero.base.errors import CheckpointError, ConfigError, DataError, MegazeroError
from megazero.base.launch import Launch
from megazero.config.schema import RunConfig
from megazero.parallel.liveness import missing_ranks
from megazero.parallel.topology import Topology


def run(work: Callable[[RunConfig], int | None], config: RunConfig) -> int:
    """Call `work(config)` and return the process's exit status (`work`'s own, if it has one), having said on stderr
    what went wrong."""
    try:
        status = work(config)
    except (ConfigError, CheckpointError) as error:  # by every rank of a machine: one says it
        if _local_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except MegazeroError as error:
        print(f"{_where()}error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, DataError) else 1
    except KeyboardInterrupt:
        print(f"{_where()}stopped at once; what came after the last checkpoint is lost", file=sys.stderr, flush=True)
        return 130
    return status or 0


def explain_lost_ranks(error: RuntimeError, iteration: int, topology: Topology) -> None:
    """If a collective failed because ranks are gone, say which, before `error` goes on."""
    from_communication = isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo raises plain RuntimeErrors
    if not (dist.is_initialized() and from_communication):
        return
    gone = missing_ranks()
    if gone:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))  # what it was doing in a pipeline
        coords = {rank: replace(topology, rank=rank).coord.items() for rank in gone}
        named = [" ".join(f"{axis} {at}" for axis, at in coords[rank] if topology.size(axis) > 1) for rank in gone]
        places = f" ({', '.join(named)})"
        ranks = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}"
        print(
            f"{_where()}error: {ranks} stopped answering in iteration {iteration + 1}{places}; this rank stops too. "
            "Look at the first error above and that machine's log (a kill by the system leaves none here). The same "
            "command resumes from the last checkpoint. "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}{notes})",
            file=sys.stderr,
            flush=True,
        )


def _local_rank() -> int:
    try:
        return Launch.from_environment().local_rank
    except ConfigError:  # the launcher's variables themselves are what is wrong
        return 0


def _where() -> str:
    launch = Launch.from_environment()
    return f"[rank {launch.rank}] " if launch.world_size > 1 else ""
