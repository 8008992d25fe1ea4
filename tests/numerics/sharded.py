"""The same training through `megazero.initialize`, on the ranks of a process group: what is measured."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import megazero
from megazero.engine.engine import Engine
from megazero.parallel.collectives import gather_objects
from tests.numerics.setting import STEPS, Outcome, Run, build, part_of

Change = Callable[[Engine], None]


@contextmanager
def engine_of(run: Run, folder: str) -> Iterator[Engine]:
    """An engine for a run; its files are gone afterwards."""
    engine = megazero.initialize(model=build(), config=run.config(folder))[0]
    try:
        yield engine
    finally:
        engine.zero.homes.close()


def outcomes(runs: list[Run], folder: str) -> list[Outcome | None]:
    """Train them one after the other. On rank 0 what came out, elsewhere None."""
    return [outcome(run, folder) for run in runs]


def outcome(run: Run, folder: str, change: Change | None = None) -> Outcome | None:
    """Ten steps. `change` is called with the new engine (a fault made on purpose)."""
    with tempfile.TemporaryDirectory(dir=folder) as own, engine_of(run, own) as engine:
        if change is not None:
            change(engine)
        if run.offload == "nvme":
            assert any(Path(own).rglob("*")), "nothing is on NVMe"
        found = Outcome([], [], [], {})
        for step in range(STEPS):
            train_step(engine, run, step)
            assert engine.last is not None
            found.losses.append(engine.last.loss)
            found.norms.append(engine.last.grad_norm if not engine.last.overflow else math.nan)
            found.skipped.append(engine.last.skipped)
        found.weights = engine.consolidated_state_dict(fp32=True)
        found.copies_differ = difference(engine, found)
    return found if engine.topology.rank == 0 else None


def train_step(engine: Engine, run: Run, step: int) -> None:
    """Forward, backward and step() of each micro-batch of this rank."""
    group = engine.topology.group("dp")
    for micro in range(run.accumulation):
        ids, target = part_of(step, group.rank, group.size, micro, run.accumulation)
        engine.backward(engine(ids, target))
        engine.step()


def difference(engine: Engine, found: Outcome) -> str:
    """The first parameter that on some rank is not the cast of the master, as the module shows it; "" if none."""
    masters = gather_objects(found.weights, engine.topology.group("world"))[0]
    with megazero.zero.GatheredParameters(engine.module.parameters()):
        wrong = [name for name, p in engine.module.named_parameters() if not _is_cast(p, masters[name])]
    everywhere = gather_objects(wrong, engine.topology.group("world"))
    return next((f"{names[0]} on rank {rank}" for rank, names in enumerate(everywhere) if names), "")


def _is_cast(parameter: nn.Parameter, master: torch.Tensor) -> bool:
    return torch.equal(parameter.detach(), master.to(parameter.dtype))
