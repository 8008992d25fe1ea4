"""Parameter bytes: formulas held to the buffers of a real engine, exactly, and to the published bytes a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megazero.plan.cut import cut_layers
from megazero.plan.memory import local_parameters, parameter_bytes, reduction_bytes
from megazero.train.build import build_engine
from megazero.zero.buckets import Bucket
from tests.plan.measure import configuration, fake

TP8 = {"parallel__tensor_model_parallel_size": 8}
PP2 = {"parallel__pipeline_model_parallel_size": 2, "training__global_batch_size": 16}

CASES: list[tuple[int, int, dict[str, Any]]] = [  # world size, rank, settings
    (1, 0, {}),
    (4, 1, {}),
    (4, 1, {"parallel__zero_stage": 0}),
    (4, 1, {"training__precision": "fp32"}),
    (4, 1, {"training__precision": "fp32", "parallel__zero_stage": 0}),
    (2, 0, {"parallel__tensor_model_parallel_size": 2, "model__add_bias_linear": True}),
    (8, 3, {**TP8, "model__qk_layernorm": True, "model__normalization": "LayerNorm"}),
    (8, 3, {**TP8, "parallel__sequence_parallel": False, "model__add_qkv_bias": True, "model__activation": "gelu"}),
    (2, 0, {"model__position_embedding_type": "learned_absolute", "model__untie_embeddings_and_output_weights": False}),
    (2, 0, {"parallel__context_parallel_size": 2, "optimizer__optimizer": "sgd"}),
    (4, 0, PP2),
    (4, 3, PP2 | {"model__untie_embeddings_and_output_weights": False}),
    (2, 0, PP2 | {"model__untie_embeddings_and_output_weights": False, "parallel__pipeline_schedule": "zbv"}),
    (2, 1, PP2 | {"parallel__pipeline_schedule": "zbv", "model__position_embedding_type": "learned_absolute"}),
]


@pytest.mark.parametrize(("world", "rank", "changes"), CASES)
def test_parameter_bytes_are_what_an_engine_allocates(world: int, rank: int, changes: dict[str, Any]) -> None:
    config = configuration(world, **changes)
    with fake(config, world, rank) as topology:
        engine, _ = build_engine(config, topology, torch.device("cpu"))
        buckets, pp_rank, group = engine.zero.buckets, topology.group("pp").rank, topology.size("zero")
        if engine.optimizer.optimizer is not None:
            engine.optimizer.step(1e-3)  # the states are made by the first step
        states = sum(
            state.nbytes for key in engine.optimizer.state_keys() for _, _, state in engine.optimizer.buffers(key)
        )
    mine = [stage for stage in cut_layers(config) if stage.rank == pp_rank]
    parameters = local_parameters(config, mine)
    assert parameters.elements == sum(bucket.numel for bucket in buckets)
    assert parameters.summed_over_tp + parameters.copied_over_tp + parameters.tied_to_other_stage == sum(
        bucket.numel for bucket in buckets if bucket.grad_sum is not None
    )
    found = parameter_bytes(config, sum(bucket.length for bucket in buckets), group)
    assert found["weights"] == _bytes(buckets, "values")
    assert found["gradients"] == _bytes(buckets, "grads")
    separate = config.training.precision == "bf16"  # fp32 masters are the weights
    assert found.get("master weights", 0) == (_bytes(buckets, "master") if separate else 0)
    assert states == pytest.approx(found["optimizer state"], rel=0.02)  # states leave out the padding


def _bytes(buckets: list[Bucket], name: str) -> int:
    return sum(getattr(bucket, name).nbytes for bucket in buckets)


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [
        ({"parallel__zero_stage": 0}, 18),
        ({"parallel__zero_stage": 1}, 6 + 12 / 8),
        ({"parallel__zero_stage": 0, "training__precision": "fp32"}, 16),
        ({"parallel__zero_stage": 1, "training__precision": "fp32"}, 8 + 8 / 8),
        ({"parallel__zero_stage": 1, "optimizer__optimizer": "sgd"}, 6 + 8 / 8),
        ({"parallel__zero_stage": 1, "optimizer__optimizer": "sgd", "optimizer__sgd_momentum": 0.0}, 6 + 4 / 8),
    ],
)
def test_bytes_a_parameter(changes: dict[str, Any], bytes_each: float) -> None:
    config = configuration(8, **changes)
    assert sum(parameter_bytes(config, 1024, 8).values()) == 1024 * bytes_each


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [
        ({}, 0.0),
        ({"parallel__grad_reduce_in_bf16": True}, 2 * (1 + 1 / 8)),
        ({"parallel__distributed_backend": "gloo"}, 4 * 7 / 8),
        ({"parallel__distributed_backend": "gloo", "parallel__grad_reduce_in_bf16": True}, 2 * 7 / 8 + 2),
    ],
)
def test_copies_on_the_wire(changes: dict[str, Any], bytes_each: float) -> None:
    config = configuration(8, **changes)
    assert reduction_bytes(config, 1024, 8) == 1024 * bytes_each
    assert reduction_bytes(config, 1024, 1) == 0.0
