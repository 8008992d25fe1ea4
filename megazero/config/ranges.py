"""The range of each number in the schema: what it may be on its own, whatever the other settings are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megazero.config.fields import FIELDS, value_of
from megazero.config.schema import RunConfig


@dataclass(frozen=True)
class Range:
    """An interval. `open_low`/`open_high`: the end itself is outside."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


_COUNT = Range(1)
_NOT_NEGATIVE = Range(0)
_POSITIVE = Range(0, open_low=True)
_SHARE = Range(0, 1, open_high=True)

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        (
            "model.num_layers",
            "model.hidden_size",
            "model.ffn_hidden_size",
            "model.num_attention_heads",
            "model.num_query_groups",
            "model.kv_channels",
            "model.max_position_embeddings",
            "model.vocab_size",
            "model.make_vocab_size_divisible_by",
            "parallel.tensor_model_parallel_size",
            "parallel.pipeline_model_parallel_size",
            "parallel.context_parallel_size",
            "parallel.expert_model_parallel_size",
            "parallel.num_virtual_stages_per_pipeline_rank",
            "parallel.num_layers_per_virtual_pipeline_stage",
            "parallel.decoder_first_pipeline_num_layers",
            "parallel.decoder_last_pipeline_num_layers",
            "parallel.ddp_bucket_size",
            "offload.offload_optimizer_buffer_count",
            "offload.offload_param_buffer_count",
            "offload.nvme_block_size",
            "offload.nvme_queue_depth",
            "offload.nvme_threads",
            "loss_scaling.loss_scale_window",
            "loss_scaling.hysteresis",
            "recompute.recompute_num_layers",
            "dry_run.world_size",
            "data.seq_length",
            "training.micro_batch_size",
            "training.global_batch_size",
            "training.gradient_accumulation_steps",
            "training.train_iters",
            "training.train_samples",
            "training.eval_interval",
            "training.exit_interval",
            "training.sample_tokens",
            "optimizer.lr_decay_iters",
            "optimizer.lr_wsd_decay_iters",
            "checkpoint.save_interval",
            "checkpoint.keep_last",
            "logging.log_interval",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "parallel.stage3_prefetch_bucket_size",
            "parallel.stage3_param_persistence_threshold",
            "parallel.stage3_max_live_parameters",
            "parallel.stage3_max_reuse_distance",
            "offload.offload_max_in_cpu",
            "loss_scaling.loss_scale",
            "training.seed",
            "training.eval_iters",
            "optimizer.lr",
            "optimizer.min_lr",
            "optimizer.lr_warmup_iters",
            "optimizer.lr_warmup_init",
            "optimizer.weight_decay",
            "optimizer.clip_grad",
            "checkpoint.ckpt_step",
            "dry_run.rank",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "model.rotary_base",
            "model.norm_epsilon",
            "model.init_method_std",
            "parallel.distributed_timeout_minutes",
            "training.exit_duration_in_mins",
            "optimizer.adam_eps",
            "loss_scaling.initial_loss_scale",
            "loss_scaling.min_loss_scale",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(
        (
            "model.hidden_dropout",
            "model.attention_dropout",
            "optimizer.adam_beta1",
            "optimizer.adam_beta2",
            "optimizer.sgd_momentum",
        ),
        _SHARE,
    ),
    "offload.offload_ratio": Range(0, 1),
    "model.rotary_percent": Range(0, 1, open_low=True),
    "model.rope_scaling_factor": Range(1),
    "optimizer.lr_warmup_fraction": _SHARE,
}
"""Recipe key -> range. A test checks that every number of the schema is here."""


def remedy_of(key: str) -> str:
    """A sentence that names a value in the key's range: its smallest, else the default."""
    allowed, default = RANGES[key], FIELDS[key].default
    if not allowed.open_low:
        return f"Use {allowed.low:g}{' or more' if allowed.high == math.inf else ''}."
    in_range = isinstance(default, int | float) and allowed.holds(default)
    return f"Use {default if in_range else min(allowed.low + 1, allowed.high):g}, for instance."


def out_of_range(config: RunConfig) -> dict[str, Range]:
    """The keys whose value is set and out of its range."""
    values = {key: value_of(config, key) for key in RANGES}
    return {key: RANGES[key] for key, value in values.items() if value is not None and not RANGES[key].holds(value)}
