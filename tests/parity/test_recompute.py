"""Recomputation changes no bit, on no layout: losses, gradients and weights of some steps with it and without."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.parity.measure import Layout, Outcome, train
from tests.parity.test_layouts import MODELS


def full(**options: Any) -> dict[str, Any]:
    return {f"recompute.{name}": value for name, value in {"recompute_granularity": "full", **options}.items()}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute.recompute_granularity": "selective", "recompute.recompute_modules": modules}


WAYS: dict[str, dict[str, Any]] = {
    "uniform 1": full(),
    "uniform 3": full(recompute_num_layers=3),  # of 4 layers: the last chunk is shorter
    "block 1": full(recompute_method="block", recompute_num_layers=1),
    "core_attn": selective("core_attn"),
    "mlp": selective("mlp"),
    "layernorm": selective("layernorm"),
    "all parts": selective("core_attn", "mlp", "layernorm"),
    "cpu": full(cpu_checkpointing=True),
    "contiguous": full(contiguous_memory_optimization=True),
    "partition": full(partition_activations=True),
    "all options": full(
        partition_activations=True,
        cpu_checkpointing=True,
        contiguous_memory_optimization=True,
        recompute_num_layers=2,
    ),
}
LAYOUTS = {
    "one process": Layout(),
    "dp2": Layout(dp=2),
    "tp2": Layout(tp=2),
    "tp2 sequence": Layout(tp=2, sequence=True),
    "tp2 dp2": Layout(tp=2, dp=2),
    "pp2 1f1b": Layout(pp=2, schedule="1f1b"),
    "pp2 tp2": Layout(pp=2, tp=2),
    "pp2 interleaved": Layout(pp=2, schedule="interleaved-1f1b", virtual=2),
    "pp2 zbv": Layout(pp=2, schedule="zbv"),
    "cp2 p2p": Layout(cp=2),
    "cp2 a2a": Layout(cp=2, cp_comm="a2a"),
}
CASES = [
    *(("tp2", way) for way in WAYS),
    *(("tp2 sequence", way) for way in WAYS if "recompute.partition_activations" not in WAYS[way]),
    *((layout, way) for layout in ("pp2 1f1b", "pp2 zbv") for way in ("uniform 3", "all parts", "contiguous")),
    *((layout, way) for layout in ("cp2 p2p", "cp2 a2a") for way in ("uniform 1", "core_attn", "layernorm")),
    ("one process", "all parts"),
    ("dp2", "uniform 1"),
    ("tp2 dp2", "all options"),
    ("pp2 tp2", "all options"),
    ("pp2 interleaved", "contiguous"),
]


def model_of(layout: str) -> dict[str, Any]:
    return MODELS["qwen" if "cp2" in layout else "dropout"]


@cache
def without(layout: str, run: Any) -> Outcome:
    outcome: Outcome = run(train, LAYOUTS[layout].world_size, LAYOUTS[layout], model_of(layout))[0]
    return outcome


@pytest.mark.parametrize(("layout", "way"), CASES)
def test_recomputing_changes_no_bit(ranks: Any, layout: str, way: str) -> None:
    here = LAYOUTS[layout]
    wanted = without(layout, ranks.run)
    found = ranks.run(train, here.world_size, here, {**model_of(layout), **WAYS[way]})[0]
    assert found.losses == wanted.losses and found.norms == wanted.norms
    for one, other in [*zip(found.gradients, wanted.gradients, strict=True), (found.weights, wanted.weights)]:
        assert [name for name in other if not torch.equal(one[name], other[name])] == []
