"""torch.distributed.pipelining's schedules as tables of actions (megazero.plan.schedule), without running them.

The interleaved and V schedules plan all ranks' actions when they are made, and that plan is what is returned. GPipe
and 1F1B are loops in torch; their orders are written out here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megazero.parallel.pipeline import MULTI
from megazero.plan.schedule import Action, Table


def schedule_table(schedule: str, pp: int, virtual: int, micro_batches: int) -> Table:
    """Every pp rank's actions of one step. `schedule` is --pipeline-schedule's, settings checked.

    An overlapped forward and backward (DualPipeV) are two actions one after the other, as torch runs them.
    """
    if schedule not in MULTI:
        return [_single(schedule, rank, pp, micro_batches) for rank in range(pp)]
    # Only the number and size of stages goes into the plan. Adding sends and receives to it takes much longer.
    stage = SimpleNamespace(num_stages=pp * virtual, group_size=pp, group_rank=0, submod=None)
    planned: Any = type("Planned", (MULTI[schedule],), {"_prepare_schedule_with_comms": lambda *_: None})
    order = planned([stage] * virtual, micro_batches).pipeline_order
    return [[action for entry in order[rank] if entry is not None for action in _actions(entry)] for rank in range(pp)]


def _single(schedule: str, rank: int, pp: int, micro_batches: int) -> list[Action]:
    """One stage a rank: the forwards of the warm-up, then a backward for each forward, then the other backwards."""
    forwards = [Action(rank, "F", index) for index in range(micro_batches)]
    backwards = [Action(rank, "B", index) for index in range(micro_batches)]
    warmup = micro_batches if schedule == "gpipe" else min(pp - rank, micro_batches)
    steady = micro_batches - warmup
    turns = [action for pair in zip(backwards[:steady], forwards[warmup:], strict=True) for action in pair]
    return [*forwards[:warmup], *turns, *backwards[steady:]]


def _actions(entry: Any) -> list[Action]:
    return [
        Action(part.stage_index, part.computation_type.value, part.microbatch_index)
        for part in entry.sub_actions or (entry,)
    ]
