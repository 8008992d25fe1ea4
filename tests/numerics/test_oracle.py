"""Stage 3 beside torch's own: `torch.distributed.fsdp.fully_shard` gives the same losses, gradients and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import megazero
from tests.harness import Ranks
from tests.numerics.setting import ADAM, STEPS, Run, build, part_of
from tests.numerics.sharded import engine_of
from tests.numerics.table import Record, record_line

TITLE = "stage 3 beside torch's fully_shard, 10 steps, largest deviation"


@dataclass
class Trained:
    """What all ranks agree on: losses are sums over ranks, gradients those of each step."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def by_torch(run: Run) -> Trained:
    """fully_shard on every block and on the whole, the mean over ranks, AdamW."""
    model = build()
    policy = MixedPrecisionPolicy()
    if run.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh("cpu", (run.ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)  # type: ignore[arg-type]
    found = Trained([], [], {})
    for step in range(STEPS):
        loss = model(*part_of(step, dist.get_rank(), run.ranks, 0, 1))
        loss.backward()
        found.losses.append(_total(loss))
        found.gradients.append({name: _full(p.grad) for name, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    found.weights = {name: _full(p) for name, p in model.named_parameters()}
    return found


def by_megazero(run: Run, folder: str) -> Trained:
    found = Trained([], [], {})
    with engine_of(run, folder) as engine:
        for step in range(STEPS):
            loss = engine(*part_of(step, dist.get_rank(), run.ranks, 0, 1))
            engine.backward(loss)
            found.losses.append(_total(loss))
            gradients = {n: megazero.zero.safe_get_full_grad(p) for n, p in engine.module.named_parameters()}
            found.gradients.append({name: gradient for name, gradient in gradients.items() if gradient is not None})
            engine.step()
        for name, parameter in engine.module.named_parameters():
            weight = megazero.zero.safe_get_full_fp32_param(parameter)
            assert weight is not None
            found.weights[name] = weight
    return found


def _total(loss: Tensor) -> float:
    summed = loss.detach().clone()
    dist.all_reduce(summed)
    return float(summed)


def _full(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().detach().clone()


def both(run: Run, folder: str) -> tuple[Trained, Trained]:
    return by_torch(run), by_megazero(run, folder)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 2), ("bf16", 2), ("fp32", 4)])
def test_fully_shard(ranks: Ranks, precision: str, size: int, tmp_path: Path, record_property: Record) -> None:
    run = Run(3, precision, ranks=size)
    for torchs, ours in ranks.run(both, size, run, str(tmp_path)):
        loss = max(abs(a - b) / abs(a) for a, b in zip(torchs.losses, ours.losses, strict=True))
        gradient = max(_far(a, b) for a, b in zip(torchs.gradients, ours.gradients, strict=True))
        weight = _far(torchs.weights, ours.weights)
        assert loss <= 1e-6
        assert gradient <= 1e-5
        assert weight <= 2e-6
    found = f"losses {loss:.1e} (relative), gradients {gradient:.1e}, weights {weight:.1e}"
    record_line(record_property, TITLE, f"{precision} on {size} ranks: {found}")


def _far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())
