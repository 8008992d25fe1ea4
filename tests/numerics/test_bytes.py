"""Bytes of each rank, component by component, are DESIGN.md's two rows; no rank holds 1% more than another.

    N ranks, a parameter       stage 0    stage 1       stage 2       stage 3
    16-bit gradients           16         4 + 12/N      2 + 14/N      16/N
    fp32 gradients (default)   18         6 + 12/N      2 + 16/N      18/N

Three counts: of the tensors that a process holds, of the engine's accounting, of the planner's formulas. The model has
one huge embedding and many tiny norms, which a partition by whole parameters would put on one rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megazero
from megazero.engine.introspection import state_bytes
from megazero.plan.memory import Homes, parameter_bytes, transient_bytes
from megazero.plan.parameters import Parameter, buckets
from tests.harness import Ranks
from tests.numerics.held import component_bytes, storages
from tests.numerics.table import Record, record_line

WIDTH, WORDS, NORMS = 32, 40_009, 200
TITLE = "bytes a parameter and rank (largest of all ranks), one huge embedding and many tiny norms"
Bytes = dict[str, float]


class Uneven(nn.Module):
    """An embedding of 1,280,288 elements, and norms of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(NORMS))

    def forward(self, ids: Tensor) -> Tensor:  # (b,)
        x = self.embed(ids)
        for norm in self.norms:
            x = x + norm(x)
        return x.float().square().mean()


def table(stage: int, gradient: int, ranks: int) -> Bytes:
    """DESIGN.md's row, by component: what is sharded is divided by N."""
    shards = [ranks if stage >= needed else 1 for needed in (1, 2, 3)]
    return {
        "weights": 2 / shards[2],
        "gradients": gradient / shards[1],
        "master weights": 4 / shards[0],
        "optimizer state": 8 / shards[0],
    }


@dataclass
class Measured:
    """Bytes a parameter on one rank, after two steps."""

    held: Bytes
    """Of tensors that are there."""
    counted: Bytes
    """By the engine's accounting."""
    planned: Homes
    """By the planner's formulas."""
    passing: Homes
    """The same of what lives for moments."""


def measured(stage: int, gradient: int, folder: str | None = None) -> Measured:
    """With a folder, weights and the optimizer's state are on NVMe."""
    before = storages()
    torch.manual_seed(0)
    zero: dict[str, Any] = {"stage": stage}
    if folder is not None:
        nvme = {"device": "nvme", "nvme_path": folder}
        zero |= {"offload_optimizer": nvme, "offload_param": {**nvme, "max_in_cpu": 0}}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
        "data_types": {"grad_accum_dtype": "bf16" if gradient == 2 else "fp32"},
    }
    engine = megazero.initialize(model=Uneven(), config=config)[0]
    ids = torch.arange(16)
    for _ in range(4):
        engine.backward(engine(ids))
        engine.step()
    engine.zero.wait_parameters()
    psi = sum(p.numel() for p in engine.module.parameters())
    held = component_bytes(engine, before)
    counted = state_bytes(engine.module, engine.zero, engine.shards)
    size, listed = engine.zero.group.size, [Parameter("embed", WORDS * WIDTH), Parameter("", psi - WORDS * WIDTH)]
    planned = parameter_bytes(engine.settings, psi, size)
    passing = transient_bytes(engine.settings, listed, buckets(listed, None), size)
    engine.zero.homes.close()
    return Measured(_each(held, psi), _each(counted, psi), _all(planned, psi), _all(passing, psi))


def _each(of: Mapping[str, float], psi: int) -> Bytes:
    return {name: count / psi for name, count in of.items()}


def _all(homes: Homes, psi: int) -> Homes:
    return Homes(_each(homes.device, psi), _each(homes.cpu, psi), _each(homes.nvme, psi))


@pytest.mark.parametrize(("size", "gradient"), list(itertools.product((2, 4), (2, 4))))
def test_both_rows(ranks: Ranks, size: int, gradient: int, record_property: Record) -> None:
    for stage in range(4):
        wanted = table(stage, gradient, size)
        row = {2: (16, 4 + 12 / size, 2 + 14 / size, 16 / size), 4: (18, 6 + 12 / size, 2 + 16 / size, 18 / size)}
        assert sum(wanted.values()) == row[gradient][stage]
        of_ranks = ranks.run(measured, size, stage, gradient)
        for found in of_ranks:
            assert found.planned.device == pytest.approx(wanted), stage
            assert found.counted == pytest.approx(wanted, rel=0.05), stage
            other = found.held.pop("other", 0.0)
            assert found.held == pytest.approx(wanted, rel=0.05), stage
            assert other <= 0.01 * sum(wanted.values()), f"stage {stage}: tensors that nobody accounts for"
        totals = [sum(found.held.values()) for found in of_ranks]
        assert max(totals) / min(totals) <= 1.01, (stage, totals)
        record_line(
            record_property,
            TITLE,
            f"N={size} {8 * gradient}-bit gradients, stage {stage}: {max(totals):6.3f}, table "
            f"{sum(wanted.values()):6.3f}, max/min {max(totals) / min(totals):.4f}",
        )


def test_on_nvme_gradients_stay(ranks: Ranks, tmp_path: Path, record_property: Record) -> None:
    """Between steps a rank's part of the reduced gradients is in memory, and buffers to read and write with."""
    for found in ranks.run(measured, 2, 3, 4, str(tmp_path)):
        wanted = table(3, 4, 2)
        gradients = {"gradients": wanted.pop("gradients")}
        assert found.planned.device == {}
        assert found.planned.cpu == pytest.approx(gradients)
        assert found.planned.nvme == pytest.approx(wanted)
        other = found.held.pop("other", 0.0)
        for of in (found.counted, found.held):
            assert {k: v for k, v in of.items() if v > 0.01} == pytest.approx(gradients, rel=0.05)  # Adam's step counts
        assert other <= 1.05 * sum(found.passing.cpu.values())
    record_line(
        record_property,
        TITLE,
        f"N=2 32-bit gradients, stage 3 + NVMe: {found.held['gradients']:.3f}, table {gradients['gradients']:.3f}; "
        f"buffers {other:.3f}, planned at most {sum(found.passing.cpu.values()):.3f}",
    )
