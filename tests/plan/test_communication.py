"""Volumes by axis and operation, held to what a real step hands to the network (parallel/traffic.py's counts)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megazero.parallel.topology import Topology
from megazero.plan.communication import communication
from megazero.plan.cut import cut_layers
from megazero.plan.parameters import parameters
from megazero.train.build import build_engine
from tests.harness import Ranks
from tests.plan.measure import batch, configuration, fake

TP2, CP2 = {"parallel__tensor_model_parallel_size": 2}, {"parallel__context_parallel_size": 2}
A2A = {**CP2, "parallel__cp_comm_type": "a2a"}
FULL = {"recompute__recompute_granularity": "full"}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute__recompute_granularity": "selective", "recompute__recompute_modules": modules}


CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (4, {}),
    (2, {"parallel__zero_stage": 0}),
    (2, {"parallel__grad_reduce_in_bf16": True, "training__global_batch_size": 8}),
    *((4, {"parallel__zero_stage": stage, "training__global_batch_size": 24}) for stage in (0, 1, 2, 3)),
    (4, {"parallel__zero_stage": 2, "parallel__grad_accum_dtype": "model", "training__global_batch_size": 16}),
    (4, {"parallel__zero_stage": 0, "parallel__grad_accum_dtype": "model"}),
    (4, {"parallel__zero_stage": 3, "parallel__stage3_param_persistence_threshold": 5000}),
    (4, {"parallel__zero_stage": 3, "parallel__stage3_max_reuse_distance": 200_000}),
    (4, {"parallel__zero_stage": 3, **FULL, "training__global_batch_size": 16}),
    (4, {"parallel__zero_stage": 3, "model__untie_embeddings_and_output_weights": False}),
    (4, {**TP2, "parallel__zero_stage": 3}),
    (4, TP2),
    (2, {**TP2, "parallel__sequence_parallel": False}),
    (8, {"parallel__tensor_model_parallel_size": 8, "model__qk_layernorm": True}),
    (2, {**TP2, **FULL}),
    (2, {**TP2, **FULL, "recompute__recompute_num_layers": 3}),
    (2, {**TP2, **FULL, "recompute__recompute_method": "block", "recompute__recompute_num_layers": 3}),
    (2, {**TP2, **FULL, "parallel__sequence_parallel": False, "recompute__partition_activations": True}),
    (2, {**TP2, **selective("core_attn")}),
    (2, {**TP2, **selective("mlp")}),
    (2, {**TP2, **selective("layernorm")}),
    (2, {**TP2, **selective("mlp", "layernorm")}),
    (2, {**TP2, **selective("mlp"), "parallel__sequence_parallel": False}),
    (2, CP2),
    (4, {**CP2, **TP2}),
    (2, {**CP2, **FULL}),
    (2, {**CP2, **selective("core_attn")}),
    (2, A2A),
    (8, {**A2A, "parallel__context_parallel_size": 8}),
    (2, {**A2A, **FULL}),
    (2, {**A2A, **selective("core_attn")}),
]


def compare(topology: Topology, world: int, changes: dict[str, Any]) -> None:
    """Run one step and hold every count to its formula."""
    config = configuration(world, **changes)
    engine, forward = build_engine(config, topology, torch.device("cpu"))
    engine.policy = "ignore"  # over a fake group sums are wrong
    assert config.training.global_batch_size is not None
    batches = config.training.global_batch_size // (config.training.micro_batch_size * topology.size("dp"))
    before = topology.traffic.totals()
    engine.train_step([batch(config) for _ in range(batches)], forward.loss_sum, 100.0, lr=1e-3)
    engine.zero.wait_parameters()
    sent = topology.traffic.since(before)
    counted = {key: count.bytes for key, count in sent.items() if key[1] not in ("scalars", "padding")}
    cut, pp_rank = cut_layers(config), topology.group("pp").rank
    listed = parameters(config, [stage for stage in cut if stage.rank == pp_rank])
    volumes = communication(config, cut, pp_rank, listed, topology.size("zero"), batches)
    # sums over tp and pp go over slices of buckets with their padding
    padding = 4 * 2 * sum(bucket.padding for bucket in engine.zero.buckets if bucket.grad_sum is not None)
    found = {(volume.axis, volume.operation): volume.bytes for volume in volumes}
    assert found == pytest.approx(counted, rel=1e-9, abs=padding)


@pytest.mark.parametrize(("world", "changes"), CASES)
def test_formulas_are_what_a_step_counts(world: int, changes: dict[str, Any]) -> None:
    config = configuration(world, **changes)
    with fake(config, world) as topology:
        compare(topology, world, changes)


def check_pipeline(changes: dict[str, Any]) -> None:
    compare(Topology.build(pp=2), 2, changes)


def check_replicated_pipeline(changes: dict[str, Any]) -> None:
    compare(Topology.build(pp=2, dp=2), 4, changes)


def test_a_pipeline_reduces_for_each_micro_batch(ranks: Ranks) -> None:
    changes = {
        "parallel__pipeline_model_parallel_size": 2,
        "parallel__zero_stage": 2,
        "training__global_batch_size": 12,
    }
    ranks.run(check_replicated_pipeline, 4, changes)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("untied", [True, False])
def test_a_pipeline_sends_what_the_formula_says(ranks: Ranks, schedule: str, untied: bool) -> None:
    changes = {
        "parallel__pipeline_model_parallel_size": 2,
        "parallel__pipeline_schedule": schedule,
        "training__global_batch_size": 8,
        "model__untie_embeddings_and_output_weights": untied,
    }
    ranks.run(check_pipeline, 2, changes)
