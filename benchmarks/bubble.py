"""Claim: each pipeline schedule's bubble is its formula's, and a replay of measured action times predicts the step.

    python benchmarks/bubble.py [--ranks 4] [--micro-batches 8] [--milliseconds 20] [--schedules 1f1b zbv …]

Stages sleep: t in forward, 2t in backward, or t for the input's gradient and t for the weight's where a schedule
splits backward; with sleeping stages, ranks need no core of their own. They run through megazero's Pipeline on gloo,
with tensors of a few bytes. idle / busy over all ranks: by formula, by replay of t and 2t in the schedule's order, and
measured. Predicted step: the schedule's order replayed with the times that each action took here.

torch runs the first stage's backward in one piece, in its weight half (there is no input that wants a gradient).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megazero.config.pipeline import place_of
from megazero.parallel.collectives import barrier, gather_objects
from megazero.parallel.pipeline import MULTI, SINGLE, LocalStage, Pipeline
from megazero.parallel.schedule_table import schedule_table
from megazero.parallel.topology import Topology
from megazero.plan.schedule import Action, Table, bubble_formula, replay

Times = dict[Action, tuple[float, float]]
HIDDEN = (1, 4)


class InputHalf(torch.autograd.Function):
    """y = x; forward and the gradient by x take `seconds` each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


class WeightHalf(torch.autograd.Function):
    """w; its gradient takes `seconds`. It is not on the way from the stage's output to its input, so that the input
    half of a backward does not come by."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return w.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


class SleepingStage(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight, self.entry = nn.Parameter(torch.zeros(HIDDEN)), nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: Tensor, is_first: bool) -> Tensor:
        x = x + self.entry if is_first else x  # the first stage too shall have a gradient by its input
        y: Tensor = InputHalf.apply(x, self.seconds)  # type: ignore[no-untyped-call]
        return y + WeightHalf.apply(self.weight, self.seconds)  # type: ignore[no-untyped-call]


def run_stage(stage: nn.Module, inputs: Any, hidden: Any, last: nn.Module | None) -> Tensor:
    out: Tensor = stage(inputs["x"] if hidden is None else hidden, hidden is None)
    return out.sum() if stage is last else out


def received(inputs: Any, stage: int) -> tuple[Tensor, ...]:
    return (torch.empty(HIDDEN, device="meta", requires_grad=True),)


def sleeping_pipeline(schedule: str, topology: Topology, micro_batches: int, seconds: float) -> Pipeline:
    group = topology.group("pp")
    stages = group.size * virtual_of(schedule)
    places = [place_of(stage, group.size, schedule).rank for stage in range(stages)]
    mine = [LocalStage(stage, SleepingStage(seconds)) for stage in range(stages) if places[stage] == group.rank]
    last = mine[-1].module if mine[-1].number == stages - 1 else None
    return Pipeline(
        mine,
        places,
        group,
        schedule=schedule,
        micro_batches=micro_batches,
        example={"x": torch.empty(HIDDEN, device="meta")},
        received=received,
        forward=partial(run_stage, last=last),
        weights_done=lambda stage: stage.zero_grad(),  # the engine too takes gradients away at once
        device=torch.device("cpu"),
    )


def virtual_of(schedule: str) -> int:
    return 1 if schedule in SINGLE else 2


def timed(pipeline: Pipeline) -> Times:
    """When each action begins and ends, filled in as the pipeline runs."""
    times: Times = {}

    def measure(stage: Any, method: str, kind_of: Callable[[dict[str, Any]], Any]) -> None:
        call = getattr(stage, method)

        def measured(micro_batch: int, *arguments: Any, **keywords: Any) -> Any:
            start = time.monotonic()
            result = call(micro_batch, *arguments, **keywords)
            times[Action(stage.stage_index, kind_of(keywords), micro_batch)] = (start, time.monotonic())
            return result

        setattr(stage, method, measured)

    for stage in pipeline.runtime:
        measure(stage, "forward_one_chunk", lambda keywords: "F")
        measure(stage, "backward_one_chunk", lambda keywords: "B" if keywords.get("full_backward", True) else "I")
        measure(stage, "backward_weight_one_chunk", lambda keywords: "W")
    return times


def measure(schedule: str, topology: Topology, micro_batches: int, seconds: float, steps: int) -> list[Times]:
    """Each step's actions on all ranks, after one step that is not measured."""
    pipeline = sleeping_pipeline(schedule, topology, micro_batches, seconds)
    times, measured = timed(pipeline), []
    batches = [{"x": torch.zeros(HIDDEN)} for _ in range(micro_batches)]
    for step in range(1 + steps):
        times.clear()
        barrier(topology.group("world"))
        pipeline.train(batches, torch.ones(()))
        together = {a: t for part in gather_objects(dict(times), topology.group("world")) for a, t in part.items()}
        if step:
            measured.append(together)
    return measured


def nominal(action: Action) -> float:
    """In units of t; the first stage's halves as torch runs them."""
    halves = {"I": 0.0, "W": 2.0} if action.stage == 0 else {"I": 1.0, "W": 1.0}
    return {"F": 1.0, "B": 2.0, **halves}[action.kind]


def row(schedule: str, ranks: int, micro_batches: int, steps: list[Times]) -> str:
    """A line of the table."""
    table: Table = schedule_table(schedule, ranks, virtual_of(schedule), micro_batches)
    actions = [action for order in table for action in order]
    formula = bubble_formula(schedule, ranks, micro_batches, virtual_of(schedule))
    ideal = replay(table, {action: nominal(action) for action in actions}).bubble
    bubbles, took, predicted = [], [], []
    for times in steps:
        assert times.keys() == set(actions), "the runtime does other actions than the plan says"
        durations = {action: end - start for action, (start, end) in times.items()}
        took.append(max(end for _, end in times.values()) - min(start for start, _ in times.values()))
        busy = sum(durations.values())
        bubbles.append((took[-1] * ranks - busy) / busy)
        predicted.append(replay(table, durations).end)
    bubble, step, guess = (statistics.median(values) for values in (bubbles, took, predicted))
    return (
        f"{schedule:<24}{formula:>8.1%}{ideal:>8.1%}{bubble:>10.1%}{guess * 1e3:>14.0f}{step * 1e3:>12.0f}"
        f"{guess / step - 1:>8.1%}"
    )


def worker(rank: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", options.port, options.ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    topology = Topology.build(pp=options.ranks)
    if rank == 0:
        print(f"{options.ranks} ranks, {options.micro_batches} micro-batches, t = {options.milliseconds} ms")
        heads = f"{'formula':>8}{'replay':>8}{'measured':>10}{'predicted ms':>14}{'step ms':>12}{'off':>8}"
        print(f"{'idle / busy':<24}{heads}")
    for schedule in options.schedules:
        steps = measure(schedule, topology, options.micro_batches, options.milliseconds / 1e3, options.steps)
        if rank == 0:
            print(row(schedule, options.ranks, options.micro_batches, steps), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--milliseconds", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--port", type=int, default=29513)
    parser.add_argument("--schedules", nargs="+", choices=[*SINGLE, *MULTI], default=[*SINGLE, *MULTI])
    options = parser.parse_args()
    torch.multiprocessing.spawn(worker, (options,), nprocs=options.ranks)


if __name__ == "__main__":
    main()
