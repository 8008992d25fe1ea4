"""Megatron's command line beyond the schema: spellings that take effect, and one line for each flag that does not.

An alias sets a field to a fixed value. Every other flag of Megatron (and DeepSpeed's two) that has no field here is an
error that says why and what to use instead, so that nothing is accepted and ignored.
Names: Megatron-LM's training arguments, core 0.20.
"""

from __future__ import annotations

from typing import Any

ALIASES: dict[str, tuple[str, Any, str]] = {
    "--bf16": ("training.precision", "bf16", "the same as --precision bf16"),
    "--fp16": ("training.precision", "fp16", "the same as --precision fp16"),
    "--accumulate-allreduce-grads-in-fp32": (
        "parallel.grad_accum_dtype",
        "fp32",
        "the same as --grad-accum-dtype fp32 (the default)",
    ),
    "--deepspeed-activation-checkpointing": (
        "recompute.recompute_granularity",
        "full",
        "the same as --recompute-granularity full",
    ),
    "--cpu-optimizer": ("offload.offload_optimizer", "cpu", "the same as --offload-optimizer cpu"),
    "--optimizer-cpu-offload": ("offload.offload_optimizer", "cpu", "the same as --offload-optimizer cpu"),
    "--swiglu": ("model.activation", "swiglu", "the same as --activation swiglu"),
    "--squared-relu": ("model.activation", "squared_relu", "the same as --activation squared_relu"),
    "--recompute-activations": (
        "recompute.recompute_granularity",
        "selective",
        "the same as --recompute-granularity selective",
    ),
    "--distribute-saved-activations": ("recompute.partition_activations", True, "the same as --partition-activations"),
    "--disable-bias-linear": ("model.add_bias_linear", False, "the same as --no-add-bias-linear"),
}
"""Flag -> (recipe key, value, help)."""

GROUP_QUERY_ATTENTION = "--group-query-attention"
"""Megatron's switch for GQA: num-query-groups is 1 unless a flag, recipe or preset sets it."""

_LATER = "not available in this version"

_EXPLAINED: dict[str, str] = {
    # Renamed or deprecated in Megatron itself.
    "renamed to --micro-batch-size.": "batch-size",
    "renamed to --lr-warmup-fraction.": "warmup",
    "renamed to --tensor-model-parallel-size.": "model-parallel-size",
    "renamed to --norm-epsilon.": "layernorm-epsilon",
    "use --position-embedding-type rope (the default).": "use-rotary-position-embeddings",
    "use --position-embedding-type rope or none.": "no-position-embedding",
    f"batch-size ramps are {_LATER} (and Megatron ignores this flag); use --global-batch-size.": "rampup-batch-size",
    f"batch-size schedules are {_LATER}; use --global-batch-size.": "step-batch-size-schedule",
    "there is one model implementation here; remove it.": "use-mcore-models transformer-impl",
    "use --recipe FILE.": "yaml-cfg",
    # Parallelism.
    "use --zero-stage 1 (the default).": "use-distributed-optimizer",
    "use --zero-stage: 0 is no_shard, 1 optim, 2 optim_grads, 3 optim_grads_params.": "data-parallel-sharding-strategy",
    "use --zero-stage 3.": "use-megatron-fsdp use-torch-fsdp2 megatron-fsdp-version",
    "ZeRO shards over all data-parallel ranks; remove it.": "outer-dp-sharding-strategy "
    "num-distributed-optimizer-instances",
    f"overlapping tp's communication with its matrix products is {_LATER}; remove it.": "tp-comm-overlap",
    "layers are cut into stages by cost, embedding and loss included; remove it.": "account-for-embedding-in-pipeline-"
    "split account-for-loss-in-pipeline-split",
    "torch's pipeline schedules decide on groups and overlap; remove it.": "microbatch-group-size-per-virtual-pipeline-"
    "stage no-overlap-p2p-communication overlap-p2p-communication-warmup-flush",
    f"context parallelism in two levels is {_LATER}; use --cp-comm-type p2p or a2a.": "hierarchical-context-parallel-"
    "sizes",
    f"mixture of experts is {_LATER}; remove it.": "num-experts moe-* overlap-moe-* expert-tensor-parallel-size",
    "use --ddp-bucket-size (elements in a bucket).": "ddp-num-buckets",
    "the loss is token-weighted, so gradients are summed; remove it.": "ddp-average-in-collective",
    "buckets are padded to the number of ranks only; remove it.": "ddp-pad-buckets-for-high-nccl-busbw",
    "the rank order is always tp, cp, dp, pp (tp fastest); remove it.": "use-tp-pp-dp-mapping",
    "gloo is used only with --distributed-backend gloo; remove it.": "disable-gloo-process-groups",
    "set NCCL's own environment variables instead.": "nccl-communicator-config-path",
    "initial weights never depend on layout or device here; remove it.": "use-cpu-initialization "
    "init-model-with-meta-device",
    # Model.
    "use --make-vocab-size-divisible-by 1.": "no-pad-vocab-size",
    "embeddings use --init-method-std.": "embedding-init-method-std",
    f"sliding windows are {_LATER}; remove it.": "window-size",
    f"norms with 1 + weight are {_LATER}; use --normalization.": "apply-layernorm-1p",
    "torch chooses the kernels here; remove it.": "attention-backend use-flash-attn no-masked-softmax-fusion "
    "no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion te-rng-tracker "
    "no-gradient-accumulation-fusion no-async-tensor-model-parallel-allreduce",
    "use --preset, or the sizes of the model section.": "spec",
    f"latent attention (MLA) is {_LATER}; use --num-query-groups.": "multi-latent-attention q-lora-rank kv-lora-rank "
    "qk-head-dim qk-pos-emb-head-dim v-head-dim",
    f"multi-token prediction is {_LATER}; remove it.": "mtp-*",
    f"hybrid models are {_LATER}; remove it.": "hybrid-override-pattern hybrid-layer-pattern",
    # Training and precision.
    f"8-bit and 4-bit floats are {_LATER}; use --bf16.": "fp8-* fp4-*",
    "renamed to --recompute-granularity full.": "checkpoint-activations",
    "the schedule counts steps; use --lr-decay-iters (samples / global-batch-size).": "lr-decay-samples",
    "the schedule counts steps; use --lr-warmup-iters or --lr-warmup-fraction.": "lr-warmup-samples",
    "the schedule counts steps; use --lr-wsd-decay-iters (samples / global-batch-size).": "lr-wsd-decay-samples",
    f"weight-decay ramps are {_LATER}; use --weight-decay.": "start-weight-decay end-weight-decay "
    "weight-decay-incr-style",
    "weight decay never applies to biases and other 1-D parameters; remove it.": "no-weight-decay-cond-type "
    "apply-wd-to-qk-layernorm",
    "one learning rate holds for all parameters; use --lr and --min-lr.": "decoupled-lr decoupled-min-lr",
    "muon has its authors' settings; use --optimizer muon alone.": "muon-*",
    "use --offload-ratio.": "optimizer-offload-fraction",
    "optimizer state is fp32, or 8 bit with --optimizer adam8bit; remove it.": "use-precision-aware-optimizer",
    "attention's softmax is in fp32 always; remove it.": "attention-softmax-in-fp32",
    "the loss is always the mean over the global batch's tokens; remove it.": "calculate-per-token-loss",
    "the loss is always chunked; remove it.": "cross-entropy-loss-fusion cross-entropy-fusion-impl",
    "use --non-finite ignore.": "no-check-for-nan-in-loss-and-grad",
    "SIGTERM and SIGINT always save and exit; remove it.": "exit-signal-handler",
    "a run always trains; --eval-iters validates before the first step.": "skip-train",
    f"CUDA graphs are {_LATER}; see --compile.": "cuda-graph-* enable-cuda-graph external-cuda-graph",
    f"fine-tuning on conversations is {_LATER}; remove it.": "sft",
    f"{_LATER}; remove it.": "iterations-to-skip manual-gc deterministic-mode tensor-parallel-num-weight-shards "
    "rerun-mode enable-experimental",
    # Data.
    "use --data-path with --split.": "train-data-path valid-data-path test-data-path per-split-data-args-path",
    "list the paths after --data-path or in a recipe's data.data_path.": "data-args-path",
    "one background thread reads the memory-mapped data; remove it.": "num-workers no-mmap-bin-files "
    "num-dataset-builder-threads dataloader-fast-cache-load dataloader-defer-npy-index-mmap",
    "data order is a shuffle by (seed, epoch); remove it.": "dataloader-type mid-level-dataset-surplus",
    "use --reset-attention-mask.": "dataloader-inter-document-masking",
    "masks are never materialised by the loader; remove it.": "no-create-attention-mask-in-dataloader",
    "use --tokenizer-model FOLDER.": "vocab-file merge-file",
    "the length of a validation is --eval-iters.": "full-validation",
    "there is one validation set, a part of --data-path; see --split.": "multiple-validation-sets",
    f"fill-in-the-middle is {_LATER}; remove it.": "fim-*",
    f"data phases are {_LATER}; use --load DIR --finetune with another --data-path.": "phase-transition-iterations",
    # Checkpoints.
    "there is one checkpoint format, and it loads on any layout; remove it.": "ckpt-format use-dist-ckpt "
    "dist-ckpt-format auto-detect-ckpt-format dist-ckpt-strictness dist-ckpt-optim-fully-reshardable "
    "ckpt-convert-format ckpt-convert-save ckpt-assume-constant-structure",
    "every rank saves and loads its own share always; remove it.": "ckpt-fully-parallel-save "
    "no-ckpt-fully-parallel-save ckpt-fully-parallel-load",
    "use --load DIR --finetune.": "pretrained-checkpoint",
    "use --finetune (weights only, iteration 0).": "no-load-optim no-load-rng",
    "checkpoints always hold the optimizer and the seeds; remove it.": "no-save-optim no-save-rng",
    "use --keep-last N.": "save-retain-interval",
    "--load of a folder without a checkpoint is always an error; remove it.": "exit-on-missing-checkpoint",
    "give the checkpoint's config.yaml as --recipe.": "use-checkpoint-args",
    "this is the default; --override-opt-param-scheduler is the opposite.": "use-checkpoint-opt-param-scheduler",
    f"saving in the background is {_LATER}; use a larger --save-interval.": "async-save async-strategy "
    "use-persistent-ckpt-worker",
    f"local checkpoints are {_LATER}; use --save-interval with --keep-last.": "non-persistent-*",
    # Logging.
    "throughput is always logged; remove it.": "log-throughput",
    f"{_LATER}; metrics.jsonl has what is measured at each step.": "log-params-norm log-num-zeros-in-grad "
    "log-memory-to-tensorboard log-progress log-straggler timing-log-level",
    f"profiling is {_LATER}; remove it.": "profile profile-step-start profile-step-end use-pytorch-profiler "
    "record-memory-history",
    # Megatron-DeepSpeed.
    "a pipeline is there only with --pipeline-model-parallel-size above 1; remove it.": "no-pipeline-parallel",
    "torch's fused kernels are taken where there are any; remove it.": "cpu-torch-adam",
    "start with torchrun or `megazero launch`; remove it.": "deepspeed-mpi",
}
"""One line: what became of the flag and what to use instead -> the flags, where `*` ends a family."""

_REASONS = {f"--{name}": reason for reason, names in _EXPLAINED.items() for name in names.split()}
_FAMILIES = {name.removesuffix("*"): reason for name, reason in _REASONS.items() if name.endswith("*")}


def explain(flag: str) -> str | None:
    """Why this flag (dashes only) of Megatron's or DeepSpeed's is none here; None when it is none of theirs either."""
    if flag in _REASONS:
        return _REASONS[flag]
    return next((reason for start, reason in _FAMILIES.items() if flag.startswith(start)), None)


def explain_alias(flag: str) -> str | None:
    """What an alias (which only the command line has) is called in a recipe, or None when this is no alias."""
    if flag == GROUP_QUERY_ATTENTION:
        return "in a recipe write num_query_groups under `model:`."
    if flag not in ALIASES:
        return None
    key, value, _ = ALIASES[flag]
    section, _, name = key.partition(".")
    return f"in a recipe write `{name}: {str(value).lower()}` under `{section}:`."
