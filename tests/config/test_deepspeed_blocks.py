"""Every configuration of the documents is read and settled, and every key of it is accounted for."""

from __future__ import annotations

import pytest

from megazero.base.errors import ConfigError
from megazero.config.deepspeed import ModelFacts, ResolvedDeepSpeed, read_deepspeed, resolve_deepspeed
from tests.config.ds_blocks import BLOCKS, paths

FACTS = ModelFacts(parameters=7_000_000, hidden_size=256, largest_layer=800_000)
RANKS = {"uneven_load": 4, "pipeline": 4}


def resolved(name: str) -> ResolvedDeepSpeed:
    ranks = RANKS.get(name, 8)
    return resolve_deepspeed(read_deepspeed(BLOCKS[name]), data_parallel_size=ranks, model=FACTS, total_steps=500)


def test_all_blocks_are_there() -> None:
    assert len(BLOCKS) == 22


@pytest.mark.parametrize("name", BLOCKS)
def test_every_key_is_used_translated_or_ignored_with_a_reason(name: str) -> None:
    report = resolved(name).report
    told = [key for key, _ in (*report.used, *report.translated, *report.ignored)]
    assert sorted(told) == sorted(paths(BLOCKS[name]))
    assert all(text for _, text in (*report.used, *report.translated, *report.ignored))


def test_zero_2_as_documented() -> None:
    parallel = resolved("zero_2").config.parallel
    assert (parallel.zero_stage, parallel.ddp_bucket_size) == (2, 200_000_000)
    assert parallel.overlap_grad_reduce
    report = resolved("zero_2").report
    assert [key.rpartition(".")[2] for key, _ in report.ignored] == [
        "allgather_partitions",
        "allgather_bucket_size",
        "reduce_scatter",
        "contiguous_gradients",
    ]


def test_zero_3_sizes_follow_the_hidden_size() -> None:
    parallel = resolved("zero_3").config.parallel
    assert parallel.ddp_bucket_size == 256 * 256
    assert parallel.stage3_prefetch_bucket_size == int(0.9 * 256 * 256)
    assert parallel.stage3_param_persistence_threshold == 2560
    assert parallel.stage3_max_live_parameters == parallel.stage3_max_reuse_distance == 10**9


def test_offload_to_cpu_and_nvme() -> None:
    offload = resolved("offload_both").config.offload
    assert (offload.offload_optimizer, offload.offload_param, offload.offload_pin_memory) == ("cpu", "cpu", True)
    offload = resolved("infinity").config.offload
    assert (offload.offload_optimizer, offload.offload_param) == ("nvme", "nvme")
    assert offload.offload_optimizer_path == offload.offload_param_path == "/local_nvme"
    assert (offload.offload_optimizer_buffer_count, offload.offload_param_buffer_count) == (4, 5)
    assert (offload.nvme_block_size, offload.nvme_queue_depth, offload.nvme_threads) == (1_048_576, 8, 1)


def test_the_complete_example() -> None:
    found = resolved("complete")
    assert found.config.training.precision == "auto"
    assert found.optimizer is not None and found.scheduler is not None
    assert found.optimizer.params == {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert found.scheduler.params == {"warmup_min_lr": 0.0, "warmup_max_lr": 5e-5, "warmup_num_steps": 50}
    assert (found.config.training.global_batch_size, found.gradient_accumulation_steps) == (8, 1)
    assert found.options.steps_per_print == 100
    assert found.config.recompute.recompute_granularity is None


def test_llama_example_with_its_total_steps() -> None:
    found = resolved("llama2_zero2")
    assert found.scheduler is not None
    assert found.scheduler.params["total_num_steps"] == 500
    assert found.config.optimizer.clip_grad == 1.0
    assert found.config.training.precision == "auto"


def test_fp16_scaling() -> None:
    scaling = resolved("fp16").config.loss_scaling
    assert (scaling.loss_scale, scaling.initial_loss_scale, scaling.loss_scale_window) == (0.0, 65536.0, 1000)
    assert (scaling.hysteresis, scaling.consecutive_hysteresis, scaling.min_loss_scale) == (2, False, 1.0)
    assert resolved("fp16").config.training.precision == "fp16"
    assert not resolved("fp16").config.training.autocast_inputs
    assert resolved("overflow").config.loss_scaling.min_loss_scale == 1e-8
    assert resolved("overflow").config.loss_scaling.initial_loss_scale == 4096.0


def test_bf16_batch_scheduler_tensor_parallel_memory() -> None:
    assert resolved("bf16").config.training.precision == "bf16"
    assert resolved("batch").gradient_accumulation_steps == 64
    scheduler = resolved("scheduler").scheduler
    assert scheduler is not None and scheduler.type == "WarmupDecayLR"
    assert resolved("tensor_parallel").config.parallel.tensor_model_parallel_size == 4
    logging = resolved("memory").config.logging
    assert logging.memory_breakdown and logging.wall_clock_breakdown


def test_activation_checkpointing_is_applied() -> None:
    recompute = resolved("activation_checkpointing").config.recompute
    assert recompute.recompute_granularity == "full"
    assert recompute.partition_activations and recompute.cpu_checkpointing and recompute.contiguous_memory_optimization


def test_pipeline_keys_reach_the_pipeline() -> None:
    found = resolved("pipeline")
    assert (found.options.seed_layers, found.options.activation_checkpoint_interval) == (True, 1)
    assert found.config.recompute.recompute_num_layers == 1
    assert resolved("pipeline_zero").config.training.global_batch_size == 2 * 8 * 8


def test_experts_are_spread_over_ranks() -> None:
    found = resolved("moe")
    assert found.config.parallel.expert_model_parallel_size == 4
    said = "parallel.expert_model_parallel_size = 4"
    assert {("moe_expert_parallel_size", said), ("moe.ep_size", said)} <= set(found.report.translated)


def test_the_pipeline_batch_of_two_replicas_says_what_would_work() -> None:
    with pytest.raises(ConfigError) as error:
        resolve_deepspeed(read_deepspeed(BLOCKS["pipeline"]), data_parallel_size=2, model=None)
    assert str(error.value) == (
        "config: train_batch_size 64 is not train_micro_batch_size_per_gpu · gradient_accumulation_steps · "
        "data-parallel ranks = 2 · 8 · 2 = 32. Use train_batch_size 32, or gradient_accumulation_steps 16, or "
        "train_micro_batch_size_per_gpu 4, or 4 data-parallel ranks."
    )


def test_sixteen_samples_in_four_portions_are_for_four_ranks() -> None:
    with pytest.raises(ConfigError) as error:
        resolve_deepspeed(read_deepspeed(BLOCKS["uneven_load"]), data_parallel_size=8, model=None)
    assert str(error.value) == (
        "config: train_batch_size 16 with gradient_accumulation_steps 4 on 8 data-parallel ranks makes 16 / (4 · 8) = "
        "0.5 samples in a micro-batch, which must be a whole number above 0. Use at most 4 data-parallel ranks, or "
        "train_batch_size 32, or gradient_accumulation_steps 2."
    )
