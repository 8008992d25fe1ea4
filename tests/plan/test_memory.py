"""Parameter bytes: formulas held to the buffers of a real engine, exactly, and to the published bytes a parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megazero.plan.cut import cut_layers
from megazero.plan.memory import parameter_bytes, reduction_bytes, transient_bytes
from megazero.plan.parameters import buckets, parameters, persistent
from megazero.train.build import build_engine
from megazero.zero.gather import Gatherer
from megazero.zero.reduction import Reduction
from tests.plan.measure import batch, configuration, fake

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
    (4, 1, {"parallel__zero_stage": 2}),
    (4, 1, {"parallel__zero_stage": 3}),
    (4, 1, {"parallel__zero_stage": 2, "parallel__grad_accum_dtype": "model", "training__precision": "fp16"}),
    (4, 1, {"parallel__zero_stage": 3, "parallel__grad_accum_dtype": "model"}),
    (4, 1, {"parallel__zero_stage": 3, "training__precision": "fp32"}),
    (4, 3, {"parallel__zero_stage": 3, "parallel__stage3_param_persistence_threshold": 5000}),
    (8, 3, {"parallel__zero_stage": 3, "parallel__tensor_model_parallel_size": 2}),
    (1, 0, {"parallel__zero_stage": 3}),
    (4, 1, {"parallel__zero_stage": 1, "offload__offload_optimizer": "cpu"}),
    (4, 1, {"parallel__zero_stage": 2, "offload__offload_optimizer": "cpu"}),
    (4, 1, {"parallel__zero_stage": 2, "offload__offload_optimizer": "nvme"}),
    (4, 1, {"parallel__zero_stage": 3, "offload__offload_optimizer": "cpu", "offload__offload_param": "cpu"}),
    (4, 1, {"parallel__zero_stage": 3, "offload__offload_param": "nvme", "offload__offload_max_in_cpu": 0}),
    (4, 1, {"parallel__zero_stage": 3, "offload__offload_optimizer": "nvme", "offload__offload_param": "nvme"}),
]


@pytest.mark.parametrize(("world", "rank", "changes"), CASES)
def test_parameter_bytes_are_what_an_engine_allocates(
    world: int, rank: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = configuration(world, **changes, **folders(changes, tmp_path))
    with fake(config, world, rank) as topology:
        engine, _ = build_engine(config, topology, torch.device("cpu"))
        made, pp_rank, group = engine.zero.buckets, topology.group("pp").rank, topology.size("zero")
        assert engine.shards is not None
        engine.shards.step(1.0)  # the states are made by the first step
        states = sum(state.nbytes for key in engine.shards.state_keys() for _, _, state in engine.shards.buffers(key))
        kept = [bucket.component_bytes() for bucket in made]
        engine.zero.homes.close()
    mine = [stage for stage in cut_layers(config) if stage.rank == pp_rank]
    listed = parameters(config, mine)
    assert sum(each.elements for each in listed) == sum(bucket.numel for bucket in made)
    summed = sum(bucket.numel for bucket in made if bucket.grad_sum is not None)
    assert sum(each.elements for each in listed if each.summed) == summed
    found = parameter_bytes(config, sum(bucket.length for bucket in made), group, persistent(config, listed))
    here = {name: found.device.get(name, 0.0) + found.cpu.get(name, 0.0) for name in found.device | found.cpu}
    for name in ("weights", "gradients", "master weights"):
        assert sum(each[name] for each in kept) == pytest.approx(here.get(name, 0), rel=0.01), name
    everywhere = here.get("optimizer state", 0.0) + found.nvme.get("optimizer state", 0.0)
    assert states == pytest.approx(everywhere, rel=0.02)  # states leave out the padding


def folders(changes: dict[str, Any], folder: Path) -> dict[str, str]:
    """A folder for each kind of offload to NVMe."""
    return {f"{key}_path": str(folder) for key, value in changes.items() if value == "nvme"}


@pytest.mark.parametrize(
    "changes", [{}, {"parallel__ddp_bucket_size": 20_000, "model__num_layers": 2}, {"model__num_layers": 1}]
)
@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_whole_for_moments(stage: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in whole buckets and gathered weights, at their most in a step, against the formula."""
    config = configuration(4, parallel__zero_stage=stage, training__global_batch_size=16, **changes)
    most = {"gradients": 0, "weights": 0}

    def watch(kind: type, method: str, name: str, count: Callable[[Any], int]) -> None:
        real = getattr(kind, method)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = real(self, *args, **kwargs)
            most[name] = max(most[name], count(self))
            return result

        monkeypatch.setattr(kind, method, watched)

    watch(
        Reduction, "_buffer", "gradients", lambda self: sum(b.grads.nbytes for b in self.buckets if b.grads is not None)
    )
    watch(
        Gatherer,
        "_start",
        "weights",
        lambda self: 2 * sum(self.buckets[i].numel for i in self._live | self._coming | self._reading),
    )
    with fake(config, 4) as topology:
        engine, forward = build_engine(config, topology, torch.device("cpu"))
        engine.policy = "ignore"
        for _ in range(2):  # the second step knows what follows what
            engine.train_step([batch(config)] * 2, forward.loss_sum, 100.0, lr=1e-3)
    listed = parameters(config, cut_layers(config))
    found = transient_bytes(config, listed, buckets(listed, config.parallel.ddp_bucket_size), 4).device
    assert most["gradients"] <= found["gradient buckets"] * 1.03  # padding
    assert most["gradients"] >= found["gradient buckets"] * 0.6
    if stage == 3:
        assert found["gathered weights"] * 0.6 <= most["weights"] <= found["gathered weights"] * 1.03


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [
        ({"parallel__zero_stage": 0}, 18),
        ({"parallel__zero_stage": 2}, 2 + 16 / 8),
        ({"parallel__zero_stage": 3}, 18 / 8),
        *(
            ({"parallel__zero_stage": stage, "parallel__grad_accum_dtype": "model"}, each)
            for stage, each in enumerate((16, 4 + 12 / 8, 2 + 14 / 8, 16 / 8))
        ),
        ({"parallel__zero_stage": 3, "training__precision": "fp32"}, 16 / 8),
        ({"parallel__zero_stage": 0, "optimizer__optimizer": "lion"}, 14),
        ({"parallel__zero_stage": 0, "optimizer__optimizer": "adam8bit"}, 12),
        ({"parallel__zero_stage": 1}, 6 + 12 / 8),
        ({"parallel__zero_stage": 0, "training__precision": "fp32"}, 16),
        ({"parallel__zero_stage": 1, "training__precision": "fp32"}, 8 + 8 / 8),
        ({"parallel__zero_stage": 1, "optimizer__optimizer": "sgd"}, 6 + 8 / 8),
        ({"parallel__zero_stage": 1, "optimizer__optimizer": "sgd", "optimizer__sgd_momentum": 0.0}, 6 + 4 / 8),
    ],
)
def test_bytes_a_parameter(changes: dict[str, Any], bytes_each: float) -> None:
    config = configuration(8, **changes)
    assert sum(parameter_bytes(config, 1024, 8).device.values()) == 1024 * bytes_each


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
