"""What ZeRO, offload, precision and optimizer must be together, and what is only warned of."""

from __future__ import annotations

from typing import Any

import pytest

from megazero.config.derive import derive
from megazero.config.rules import engine_problems, find_problems
from megazero.config.zero_rules import warnings_of
from tests.config.settings import config_with


def problems(**changes: Any) -> list[str]:
    return find_problems(derive(config_with(**changes), 4), 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__zero_stage": 0},
        {"parallel__zero_stage": 2, "parallel__pipeline_model_parallel_size": 2, "training__global_batch_size": 8},
        {"parallel__zero_stage": 3, "parallel__pipeline_model_parallel_size": 2, "training__global_batch_size": 8},
        {"parallel__zero_stage": 3, "parallel__context_parallel_size": 2},
        {"parallel__zero_stage": 3, "offload__offload_param": "cpu", "offload__offload_optimizer": "cpu"},
        {
            "offload__offload_optimizer": "nvme",
            "offload__offload_optimizer_path": "/tmp",
            "offload__offload_ratio": 0.5,
        },
        {"training__precision": "fp16", "loss_scaling__loss_scale": 128.0},
        {"training__precision": "fp16", "loss_scaling__initial_loss_scale": 2.0, "loss_scaling__min_loss_scale": 1e-8},
        {"training__autocast": "fp16", "loss_scaling__hysteresis": 1},
        {"training__autocast": "bf16", "training__precision": "fp32"},
        {"optimizer__optimizer": "adam8bit", "optimizer__decoupled_weight_decay": False},
    ],
)
def test_what_works(changes: dict[str, Any]) -> None:
    assert problems(**changes) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "parallel__zero_stage": 3,
                "parallel__pipeline_model_parallel_size": 2,
                "parallel__pipeline_schedule": "zbv",
                "parallel__num_virtual_stages_per_pipeline_rank": 2,
                "training__global_batch_size": 8,
            },
            "--zero-stage 3 with --pipeline-schedule zbv: it runs each backward in two halves, and the weights are let "
            "go after the first. Use --zero-stage 2, or --pipeline-schedule 1f1b.",
        ),
        (
            {"parallel__zero_stage": 0, "offload__offload_optimizer": "cpu"},
            "--offload-optimizer cpu with --zero-stage 0: each rank offloads its own shard of the optimizer's state, "
            "and stage 0 has no shards. Use --zero-stage 1, 2 or 3, or --offload-optimizer none.",
        ),
        (
            {"parallel__zero_stage": 2, "offload__offload_param": "cpu"},
            "--offload-param cpu with --zero-stage 2: weights can only be away between uses when they are sharded. Use "
            "--zero-stage 3, or --offload-param none.",
        ),
        (
            {"offload__offload_optimizer": "nvme"},
            "--offload-optimizer nvme needs a folder on a local disk. Give --offload-optimizer-path FOLDER, "
            "or use --offload-optimizer cpu.",
        ),
        (
            {"parallel__zero_stage": 3, "offload__offload_param": "nvme"},
            "--offload-param nvme needs a folder on a local disk. Give --offload-param-path FOLDER, "
            "or use --offload-param cpu.",
        ),
        (
            {"training__autocast": "bf16", "training__precision": "bf16"},
            "--autocast bf16 with --precision bf16: under autocast the weights stay fp32. Use --precision fp32, or "
            "--autocast none.",
        ),
        (
            {
                "training__precision": "fp16",
                "loss_scaling__loss_scale": 8.0,
                "loss_scaling__initial_loss_scale": 16.0,
            },
            "--loss-scale 8.0 is fixed, and --initial-loss-scale 16.0 is where an adaptive scale starts. Give one.",
        ),
        (
            {
                "training__precision": "fp16",
                "loss_scaling__min_loss_scale": 8.0,
                "loss_scaling__initial_loss_scale": 4.0,
            },
            "--initial-loss-scale 4.0 is below --min-loss-scale 8.0: the scale starts at the one and never falls below "
            "the other. Use --min-loss-scale 4 or less.",
        ),
        (
            {"optimizer__optimizer": "muon", "parallel__tensor_model_parallel_size": 2},
            "--optimizer muon with --tensor-model-parallel-size 2: it updates whole matrices, and tensor parallelism "
            "divides them. Use --optimizer adam, or --tensor-model-parallel-size 1.",
        ),
        (
            {"parallel__stage3_max_reuse_distance": 5},
            "--stage3-max-reuse-distance 5 has no effect without --zero-stage 3. Give that too, or leave out "
            "--stage3-max-reuse-distance.",
        ),
        (
            {"offload__offload_ratio": 0.5},
            "--offload-ratio 0.5 has no effect without --offload-optimizer cpu. Give that too, or leave out "
            "--offload-ratio.",
        ),
        (
            {"offload__offload_optimizer": "cpu", "offload__offload_optimizer_path": "/tmp"},
            "--offload-optimizer-path /tmp has no effect without --offload-optimizer nvme. Give that too, or leave out "
            "--offload-optimizer-path.",
        ),
        (
            {"offload__offload_max_in_cpu": 5},
            "--offload-max-in-cpu 5 has no effect without --offload-param nvme. Give that too, or leave out "
            "--offload-max-in-cpu.",
        ),
        (
            {"offload__offload_optimizer": "cpu", "offload__nvme_threads": 5},
            "--nvme-threads 5 has no effect without --offload-optimizer nvme. Give that too, or leave out "
            "--nvme-threads.",
        ),
        (
            {"offload__offload_pin_memory": False},
            "--no-offload-pin-memory has no effect without --offload-optimizer cpu. Give that too, or leave out "
            "--offload-pin-memory.",
        ),
        (
            {"training__precision": "bf16", "loss_scaling__hysteresis": 5},
            "--hysteresis 5 has no effect without --precision fp16. Give that too, or leave out --hysteresis.",
        ),
        (
            {"optimizer__optimizer": "sgd", "optimizer__decoupled_weight_decay": False},
            "--no-decoupled-weight-decay has no effect without --optimizer adam. Give that too, or leave out "
            "--decoupled-weight-decay.",
        ),
    ],
)
def test_what_does_not(changes: dict[str, Any], message: str) -> None:
    assert problems(**changes) == [message]


def test_numbers_of_what_is_off_may_stand_in_a_file() -> None:
    config = config_with(loss_scaling__hysteresis=5, offload__offload_ratio=0.5)
    config.origins.update(dict.fromkeys(("loss_scaling.hysteresis", "offload.offload_ratio"), "recipes/x.yaml"))
    assert find_problems(derive(config, 1), 1) == []


def test_ratio_has_a_range() -> None:
    (problem,) = problems(offload__offload_ratio=1.5, offload__offload_optimizer="cpu")
    assert problem.startswith("--offload-ratio 1.5: must be at least 0 and at most 1. Use ")
    assert problems(offload__offload_ratio=0.0, offload__offload_optimizer="cpu") == []


def test_the_engine_alone_is_checked_without_model_and_data() -> None:
    config = derive(config_with(model__vocab_size=None, parallel__zero_stage=0, offload__offload_optimizer="cpu"), None)
    assert [text.partition(":")[0] for text in engine_problems(config)] == [
        "--offload-optimizer cpu with --zero-stage 0"
    ]


def test_derived_values() -> None:
    filled = derive(config_with(training__autocast="bf16"), 1)
    assert filled.training.precision == "fp32"
    assert filled.loss_scaling.initial_loss_scale == 65536
    assert filled.parallel.stage3_param_persistence_threshold == 0


def test_what_is_warned_of() -> None:
    assert warnings_of(config_with()) == []
    assert warnings_of(config_with(parallel__zero_stage=2)) == []
    assert warnings_of(config_with(parallel__zero_stage=2, parallel__pipeline_model_parallel_size=2)) == [
        "--zero-stage 2 with --pipeline-model-parallel-size 2: gradients are reduced once for each micro-batch; "
        "--zero-stage 1 communicates once a step, if its memory suffices."
    ]
    (weights,) = warnings_of(config_with(parallel__zero_stage=3, parallel__pipeline_model_parallel_size=2))
    assert "weights are gathered and gradients reduced once for each micro-batch" in weights
    assert warnings_of(config_with(parallel__grad_accum_dtype="model", training__precision="fp16")) == [
        "--grad-accum-dtype model with --precision fp16: gradients are summed in 16 bit over ranks and micro-batches; "
        "--grad-accum-dtype fp32 keeps what small ones add."
    ]
