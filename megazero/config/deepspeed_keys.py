"""Every key of a ds_config.json, and what becomes of it: one table, TABLE.

    To       the value of a setting of ours               Value    means something only together with other keys
    Dead     no effect here, and why                      Off      a feature that is not here: only its "off" values
    Closed   a section of such a feature                  Named    a `type` and its `params`

Names and meanings: DeepSpeed 0.19 (runtime/config.py, runtime/zero/config.py, runtime/zero/offload_config.py,
runtime/precision_config.py, runtime/constants.py) and older spellings that its documents still show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class To:
    """Sets these recipe keys to the key's value, or to what `convert` makes of one of type `kind`."""

    keys: tuple[str, ...]
    convert: Callable[[Any], Any] | None = None
    kind: Any = None


@dataclass(frozen=True)
class Dead:
    """Has no effect here."""

    reason: str


@dataclass(frozen=True)
class Off:
    """Belongs to a feature that is not here: these values switch it off and are fine, others are an error."""

    values: tuple[Any, ...]
    remedy: str


@dataclass(frozen=True)
class Closed:
    """A whole section of a feature that is not here: fine while it is off, else an error or just ignored."""

    remedy: str
    harmless: bool = False
    """It only reports, so a run without it is the same run."""
    switches: tuple[str, ...] = ("enabled",)
    """Keys that switch the feature on; without any, the section's presence does."""
    keys: str = ""
    """Names that may stand in it besides, where they are known."""


@dataclass(frozen=True)
class Value:
    """Kept for a translation that reads several keys (deepspeed_translate.py)."""

    kind: Any


@dataclass(frozen=True)
class Named:
    """The sections `optimizer` and `scheduler`: what they are called and their parameters (deepspeed_optimizers.py)."""


Entry = To | Dead | Off | Closed | Value | Named


def _to(*keys: str, convert: Callable[[Any], Any] | None = None, kind: Any = None) -> To:
    return To(keys, convert, kind)


def _each(names: str, entry: Entry, under: str = "") -> dict[str, Entry]:
    return {under + name: entry for name in names.split()}


def _off(*values: Any, remedy: str = "remove it") -> Off:
    return Off(values, remedy)


_BUCKETS = "weights are gathered by the buckets of reduce_bucket_size"
_SLICES = "each rank owns a slice of every bucket, so gradients go straight to their owners"
_ANY_LAYOUT = "a checkpoint loads at any stage and on any number of ranks"
_FP32_SUMS = "gradients are summed in fp32 and divided once, at the step"
_THREADS = "reads and writes go through a pool of threads"

_ZERO: dict[str, Entry] = {
    "stage": _to("parallel.zero_stage"),
    "reduce_bucket_size": _to("parallel.ddp_bucket_size"),
    "overlap_comm": _to("parallel.overlap_grad_reduce"),
    "stage3_prefetch_bucket_size": _to("parallel.stage3_prefetch_bucket_size"),
    "stage3_param_persistence_threshold": _to("parallel.stage3_param_persistence_threshold"),
    "stage3_max_live_parameters": _to("parallel.stage3_max_live_parameters"),
    "stage3_max_reuse_distance": _to("parallel.stage3_max_reuse_distance"),
    "stage3_model_persistence_threshold": Dead("stage3_param_persistence_threshold alone decides what stays whole"),
    "allgather_partitions": Dead("weights are always gathered, never broadcast"),
    "allgather_bucket_size": Dead(_BUCKETS),
    **_each("reduce_scatter use_multi_rank_bucket_allreduce round_robin_gradients", Dead(_SLICES)),
    "contiguous_gradients": Dead("gradients are always in contiguous buckets"),
    "sub_group_size": Dead("the optimizer steps bucket by bucket"),
    "stage3_gather_16bit_weights_on_model_save": Dead("saving a whole model always gathers its weights"),
    **_each("elastic_checkpoint load_from_fp32_weights pipeline_loading_checkpoint legacy_stage1", Dead(_ANY_LAYOUT)),
    "ignore_unused_parameters": _off(True, remedy="remove it: a parameter may always go unused"),
    **_each(
        "memory_efficient_linear override_module_apply module_granularity_threshold enable_sanity_checks "
        "stage3_use_all_reduce_for_fetch_params use_all_reduce_for_fetch_params allgather_sequential "
        "stage3_allgather_sequential log_trace_cache_warnings stage3_module_granularity_threshold",
        Dead("tunes DeepSpeed's own way of gathering; units are gathered as wholes here"),
    ),
    **_each("zero_hpz_partition_size", _off(1)),
    **_each("mics_shard_size", _off(-1, 0)),
    **_each("mics_hierarchical_params_gather", _off(False)),
    **_each(
        "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients",
        _off(False, remedy="remove it; communication_data_type bf16 halves what gradients send"),
    ),
    **_each("zeropp_loco_param zenflow leaf_module", _off()),
    "save_muon_momentum_buffer_in_memory": Dead("muon's momentum is kept where offload_optimizer says"),
    "offload_optimizer.device": _to("offload.offload_optimizer"),
    "offload_optimizer.nvme_path": _to("offload.offload_optimizer_path"),
    "offload_optimizer.buffer_count": _to("offload.offload_optimizer_buffer_count"),
    "offload_optimizer.pin_memory": Value(bool),
    "offload_optimizer.ratio": _to("offload.offload_ratio"),
    "offload_optimizer.pipeline_read": _to("offload.offload_pipeline_read"),
    "offload_optimizer.pipeline_write": _to("offload.offload_pipeline_write"),
    "offload_optimizer.fast_init": Dead("the files are written once, as they are made"),
    "offload_optimizer.buffer_size": Dead("a buffer holds one bucket"),
    "offload_optimizer.super_offload": _off(False),
    "offload_optimizer.cpuadam_cores_perc": Dead("the CPU's step uses the threads of the process"),
    "offload_param.device": _to("offload.offload_param"),
    "offload_param.nvme_path": _to("offload.offload_param_path"),
    "offload_param.buffer_count": _to("offload.offload_param_buffer_count"),
    "offload_param.buffer_size": Dead("shards are read straight into the gathered bucket, whatever its size"),
    "offload_param.max_in_cpu": _to("offload.offload_max_in_cpu"),
    "offload_param.pin_memory": Value(bool),
    **_each("cpu_offload cpu_offload_params cpu_offload_use_pin_memory", Value(bool)),
}

_PRECISION: dict[str, Entry] = {
    "fp16.enabled": Value(bool),
    "fp16.auto_cast": _to("training.autocast_inputs"),
    "fp16.loss_scale": _to("loss_scaling.loss_scale"),
    "fp16.initial_scale_power": _to("loss_scaling.initial_loss_scale", kind=float, convert=lambda power: 2.0**power),
    "fp16.loss_scale_window": _to("loss_scaling.loss_scale_window"),
    "fp16.hysteresis": _to("loss_scaling.hysteresis"),
    "fp16.consecutive_hysteresis": _to("loss_scaling.consecutive_hysteresis"),
    "fp16.min_loss_scale": _to("loss_scaling.min_loss_scale"),
    "fp16.fused_mode": Dead("the optimizer's step is always fused"),
    "fp16.fp16_master_weights_and_grads": _off(False, remedy="remove it: masters are fp32"),
    "bf16.enabled": Value(bool),
    "bf16.immediate_grad_update": Dead("a gradient is taken as soon as it is there"),
    "bf16.check_grad_overflow": _to("training.non_finite", kind=bool, convert=lambda on: "skip" if on else "ignore"),
    "bf16.bf16_master_weights_and_grads": _off(False, remedy="remove it: masters are fp32"),
    "bf16.bf16_optimizer_states": _off(False, remedy='remove it; the optimizer type "Adam8bit" has smaller states'),
    "torch_autocast.enabled": Value(bool),
    "torch_autocast.dtype": Value(Literal["bfloat16", "bf16", "float16", "fp16", "half"]),
    "torch_autocast.lower_precision_safe_modules": _off([], remedy="remove it: torch decides for each operation"),
    "data_types.grad_accum_dtype": Value(Literal["fp32", "float32", "bf16", "bfloat16", "fp16", "float16"]),
    "communication_data_type": Value(Literal["fp32", "float32", "bf16", "bfp16", "bfloat16", "fp16", "float16"]),
    "amp": Closed("apex's amp is not supported; use fp16, bf16 or torch_autocast"),
}

_ACTIVATIONS: dict[str, Entry] = {
    "partition_activations": Value(bool),
    "cpu_checkpointing": Value(bool),
    "contiguous_memory_optimization": Value(bool),
    "number_checkpoints": Dead("each recomputed block is one checkpoint"),
    "synchronize_checkpoint_boundary": Dead("nothing waits for the device between blocks"),
    "profile": Dead("wall_clock_breakdown times forward and backward"),
}

_PARALLEL: dict[str, Entry] = {
    "tensor_parallel.tp_size": _to("parallel.tensor_model_parallel_size", kind=int, convert=lambda size: size or 1),
    "tensor_parallel.enabled": Value(bool),
    "tensor_parallel.mpu": _off(remedy="give it to initialize(mpu=...)"),
    "tensor_parallel.tp_group": _off(remedy="give initialize(mpu=...), which has the groups"),
    "tensor_parallel.tp_grain_size": Dead("ranks hold equal parts of whole heads"),
    "tensor_parallel.tp_overlap_comm": _off(False),
    "tensor_parallel.dtype": Dead("the weights' type is fp16.enabled's and bf16.enabled's to say"),
    **_each("preset_model partition_config injection_policy_tuple", _off(), under="tensor_parallel."),
    "tensor_parallel.keep_module_on_host": _off(False),
    "moe_expert_parallel_size": Value(int),
    "moe.enabled": Value(bool),
    "moe.ep_size": Value(int),
    "moe.moe_param_group": Dead("experts get groups of their own always"),
    "use_data_before_expert_parallelism": _off(False),
    "expert_parallel": Closed("use moe with ep_size"),
    "sequence_parallel_size": _off(
        1,
        remedy="remove it; pretrain_gpt.py has it for its own models: --context-parallel-size with --cp-comm-type a2a",
    ),
    **_each(
        "seq_parallel_communication_data_type seq_parallel_comm_data_type", Dead("activations travel in their own type")
    ),
    "pipeline.seed_layers": Value(bool),
    "pipeline.activation_checkpoint_interval": Value(int),
    **_each("stages partition partition_method", Dead("PipelineModule's arguments decide"), under="pipeline."),
    **_each(
        "pipe_partitioned grad_partitioned use_reentrant",
        Dead("tuned DeepSpeed's own runtime; torch.distributed.pipelining runs the schedule"),
        under="pipeline.",
    ),
}

_REPORTS: dict[str, Entry] = {
    "steps_per_print": Value(float),
    "wall_clock_breakdown": _to("logging.wall_clock_breakdown"),
    "memory_breakdown": _to("logging.memory_breakdown"),
    "dump_state": Dead("the resolved configuration is printed and saved always"),
    "tensorboard.enabled": Value(bool),
    "tensorboard.output_path": Value(str),
    "tensorboard.job_name": Value(str),
    "wandb.enabled": Value(bool),
    "wandb.project": Value(str),
    "wandb.team": Dead("set WANDB_ENTITY, which wandb reads itself"),
    "wandb.group": Dead("set WANDB_RUN_GROUP, which wandb reads itself"),
    "csv_monitor.enabled": Value(bool),
    "csv_monitor.output_path": Value(str),
    "csv_monitor.job_name": Value(str),
    "comet": Closed("use tensorboard or wandb", harmless=True),
    "flops_profiler": Closed(
        "wall_clock_breakdown times the parts of a step",
        harmless=True,
        keys="recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    ),
    "comms_logger": Closed(
        "megazero.parallel.traffic counts what a rank sends", harmless=True, keys="prof_all prof_ops verbose debug"
    ),
    "timers": Closed("wall_clock_breakdown times the parts of a step", harmless=True),
    "monitor_config": Closed("use tensorboard, wandb or csv_monitor", harmless=True),
}

_FEATURES: dict[str, Entry] = {
    "elasticity": Closed("a checkpoint loads on any number of ranks: restart with what there is"),
    "autotuning": Closed("`megazero plan` finds the fastest setting that fits"),
    "compile": Closed(
        "remove it, and use torch.compile on the model",
        switches=("deepcompile", "enabled"),
        keys="backend kwargs free_activation free_activation_threshold offload_activation offload_opt_states "
        "double_buffer symmetric_memory debug_log offload_parameters sync_before_reduce sync_after_reduce "
        "sync_before_allgather sync_after_allgather keep_int_input_tensors keep_all_input_tensors passes",
    ),
    "progressive_layer_drop": Closed("remove it", keys="theta gamma"),
    "eigenvalue": Closed(
        "remove it", keys="verbose max_iter tol stability gas_boundary_resolution layer_name layer_num"
    ),
    **_each(
        "hybrid_engine curriculum_learning data_efficiency quantize_training nebula weight_quantization",
        Closed("remove it"),
    ),
    "compression_training": Closed("remove it", switches=()),
    "sparse_attention": Closed("remove it", switches=()),
    "graph_harvesting": _off(False),
    "vocabulary_size": Dead("the model has it"),
    "gradient_allreduce_op": _off("mean", remedy="remove it: the gradient is that of the mean loss"),
    "managed_gradient_accumulation": _off(True),
}

TABLE: dict[str, Entry] = {
    "train_batch_size": _to("training.global_batch_size"),
    "train_micro_batch_size_per_gpu": _to("training.micro_batch_size"),
    "gradient_accumulation_steps": _to("training.gradient_accumulation_steps"),
    "gradient_clipping": _to("optimizer.clip_grad"),
    "optimizer": Named(),
    "scheduler": Named(),
    **_PRECISION,
    **{f"zero_optimization.{name}": entry for name, entry in _ZERO.items()},
    "zero_allow_untested_optimizer": Dead("any element-wise torch optimizer works"),
    "zero_force_ds_cpu_optimizer": Dead("any element-wise torch optimizer works, offloaded too"),
    "aio.block_size": _to("offload.nvme_block_size"),
    "aio.queue_depth": _to("offload.nvme_queue_depth"),
    "aio.intra_op_parallelism": _to("offload.nvme_threads"),
    **_each("single_submit overlap_events", Dead(_THREADS), under="aio."),
    "aio.use_gds": _off(False),
    **_PARALLEL,
    **{f"activation_checkpointing.{name}": entry for name, entry in _ACTIVATIONS.items()},
    **_REPORTS,
    **_each("prescale_gradients gradient_predivide_factor fp32_allreduce", Dead(_FP32_SUMS)),
    "sparse_gradients": Dead("embedding gradients are dense: the same numbers"),
    **_each("disable_allgather allgather_size", Dead("weights are always gathered, never broadcast")),
    "dataloader_drop_last": Value(bool),
    "checkpoint.tag_validation": Dead("ranks that save under different tags are always an error"),
    "checkpoint.load_universal": Dead(_ANY_LAYOUT),
    "checkpoint.use_node_local_storage": _off(False, remedy="give a folder that all machines see"),
    **_each("parallel_write checkpoint_serialization writer", Dead("every rank writes its share"), "checkpoint."),
    **_FEATURES,
}
"""Path -> entry."""

ALIASES: dict[str, str] = {
    "bfloat16": "bf16",
    "zero_optimization.aio": "aio",
    "aio.thread_count": "aio.intra_op_parallelism",
    "tensor_parallel.tp": "tensor_parallel",
    "tensor_parallel.autotp_size": "tensor_parallel.tp_size",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "zero_optimization."
    "stage3_gather_16bit_weights_on_model_save",
    **{
        f"zero_optimization.{name}": f"zero_optimization.stage3_{name}"
        for name in (
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
        )
    },
}
"""Other spellings of a path or of a section."""


FOREIGN: dict[str, str] = {
    **dict.fromkeys(
        ("micro_batch_size", "per_device_train_batch_size", "train_micro_batch_size", "micro_batch_size_per_gpu"),
        "train_micro_batch_size_per_gpu",
    ),
    "global_batch_size": "train_batch_size",
    "batch_size": "train_batch_size (of a step, over all ranks) or train_micro_batch_size_per_gpu",
    **dict.fromkeys(("max_grad_norm", "clip_grad", "grad_clip", "gradient_clip_val"), "gradient_clipping"),
    **dict.fromkeys(("lr", "learning_rate"), "optimizer.params.lr"),
    **dict.fromkeys(("weight_decay", "betas", "eps"), "one of optimizer.params"),
    "warmup_steps": "scheduler.params.warmup_num_steps",
    "zero_stage": "zero_optimization.stage",
    **dict.fromkeys(("precision", "dtype", "mixed_precision"), "bf16.enabled or fp16.enabled"),
    "gradient_checkpointing": "the model's own gradient_checkpointing_enable()",
    "seed": "torch.manual_seed in the script: a ds_config has no seed",
    "wandb.entity": "wandb.team",
}
"""Paths as others call them -> what it is here."""


def section_keys(section: str) -> list[str]:
    """The names that may stand directly in a section; "" is the top."""
    start = f"{section}." if section else ""
    paths = [*TABLE, *ALIASES]
    return list(dict.fromkeys(path[len(start) :].partition(".")[0] for path in paths if path.startswith(start)))


def homes(name: str) -> Sequence[str]:
    """The paths that end in this name."""
    return [path for path in TABLE if path.rpartition(".")[2] == name]
