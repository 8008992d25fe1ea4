"""Megatron's command line: each flag of its parser is ours, an alias, or explained in one line."""

from __future__ import annotations

import pytest

from megazero.base.errors import ConfigError
from megazero.config.fields import FIELDS
from megazero.config.flags import build_parser, parse_run_config
from megazero.config.megatron import ALIASES, explain, explain_alias

# Megatron-LM core 0.20, training arguments and the names that it renamed or dropped.
_NAMES = """
tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size
expert-tensor-parallel-size sequence-parallel cp-comm-type hierarchical-context-parallel-sizes
num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank pipeline-model-parallel-layout
decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers account-for-embedding-in-pipeline-split
account-for-loss-in-pipeline-split microbatch-group-size-per-virtual-pipeline-stage no-overlap-p2p-communication
overlap-p2p-communication-warmup-flush use-distributed-optimizer overlap-grad-reduce overlap-param-gather
ddp-bucket-size ddp-num-buckets ddp-average-in-collective ddp-pad-buckets-for-high-nccl-busbw grad-reduce-in-bf16
num-distributed-optimizer-instances use-megatron-fsdp megatron-fsdp-version data-parallel-sharding-strategy
outer-dp-sharding-strategy use-torch-fsdp2 distributed-backend distributed-timeout-minutes use-tp-pp-dp-mapping
disable-gloo-process-groups nccl-communicator-config-path tensor-parallel-num-weight-shards
num-layers hidden-size num-attention-heads seq-length max-position-embeddings ffn-hidden-size kv-channels
group-query-attention num-query-groups position-embedding-type rotary-base rotary-percent use-rope-scaling
rope-scaling-factor normalization norm-epsilon swiglu squared-relu disable-bias-linear add-qkv-bias qk-layernorm
untie-embeddings-and-output-weights make-vocab-size-divisible-by no-pad-vocab-size hidden-dropout attention-dropout
init-method-std embedding-init-method-std window-size transformer-impl attention-backend spec multi-latent-attention
q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim mtp-num-layers mtp-loss-scaling-factor
micro-batch-size global-batch-size step-batch-size-schedule train-iters train-samples exit-interval
exit-duration-in-mins exit-signal-handler seed optimizer lr min-lr lr-decay-style lr-decay-iters lr-decay-samples
lr-warmup-iters lr-warmup-samples lr-warmup-fraction lr-warmup-init lr-wsd-decay-style lr-wsd-decay-iters
lr-wsd-decay-samples weight-decay start-weight-decay end-weight-decay weight-decay-incr-style clip-grad adam-beta1
adam-beta2 adam-eps muon-momentum decoupled-lr decoupled-min-lr recompute-activations recompute-granularity
recompute-method recompute-num-layers recompute-modules distribute-saved-activations calculate-per-token-loss
cross-entropy-loss-fusion cross-entropy-fusion-impl no-gradient-accumulation-fusion no-check-for-nan-in-loss-and-grad
iterations-to-skip manual-gc optimizer-cpu-offload use-precision-aware-optimizer fp16 bf16 loss-scale
initial-loss-scale min-loss-scale loss-scale-window hysteresis attention-softmax-in-fp32
accumulate-allreduce-grads-in-fp32 fp8-format fp8-recipe fp8-param-gather fp4-format
data-path train-data-path valid-data-path test-data-path data-args-path per-split-data-args-path split
data-cache-path mock-data num-workers reset-position-ids reset-attention-mask eod-mask-loss
dataloader-inter-document-masking no-create-attention-mask-in-dataloader no-mmap-bin-files dataloader-type
num-dataset-builder-threads mid-level-dataset-surplus dataloader-fast-cache-load
dataloader-defer-npy-index-mmap fim-rate phase-transition-iterations tokenizer-type tokenizer-model vocab-file
merge-file vocab-size eval-iters eval-interval full-validation multiple-validation-sets skip-train
save save-interval save-retain-interval load pretrained-checkpoint finetune ckpt-step ckpt-format
auto-detect-ckpt-format use-checkpoint-args exit-on-missing-checkpoint no-save-optim no-load-optim no-save-rng
no-load-rng override-opt-param-scheduler use-checkpoint-opt-param-scheduler async-save async-strategy
use-persistent-ckpt-worker no-ckpt-fully-parallel-save ckpt-fully-parallel-load ckpt-assume-constant-structure
dist-ckpt-strictness dist-ckpt-optim-fully-reshardable ckpt-convert-format ckpt-convert-save
non-persistent-save-interval log-interval log-throughput log-params-norm log-num-zeros-in-grad timing-log-level
tensorboard-dir wandb-project wandb-exp-name log-memory-to-tensorboard log-progress log-straggler profile
profile-step-start profile-step-end use-pytorch-profiler record-memory-history num-experts moe-layer-freq
moe-router-topk moe-router-load-balancing-type moe-aux-loss-coeff moe-grouped-gemm moe-token-dispatcher-type
overlap-moe-expert-parallel-comm deterministic-mode sft rerun-mode tp-comm-overlap cuda-graph-impl te-rng-tracker
use-cpu-initialization yaml-cfg enable-experimental init-model-with-meta-device
batch-size warmup model-parallel-size checkpoint-activations rampup-batch-size use-mcore-models use-dist-ckpt
dist-ckpt-format ckpt-fully-parallel-save enable-cuda-graph external-cuda-graph cuda-graph-scope
use-rotary-position-embeddings no-position-embedding hybrid-override-pattern no-weight-decay-cond-type
moe-enable-deepep moe-deepep-num-sms use-flash-attn
"""
MEGATRON = _NAMES.split()


def test_every_flag_of_megatron_is_ours_or_explained() -> None:
    ours = build_parser()._option_string_actions
    assert [name for name in MEGATRON if f"--{name}" not in ours and explain(f"--{name}") is None] == []
    assert [name for name in MEGATRON if f"--{name}" in ours and explain(f"--{name}") is not None] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-size", "4"], "--batch-size: renamed to --micro-batch-size."),
        (["--use-distributed-optimizer"], "--use-distributed-optimizer: use --zero-stage 1 (the default)."),
        (
            ["--use-rotary-position-embeddings"],
            "--use-rotary-position-embeddings: use --position-embedding-type rope (the default).",
        ),
        (["--use-megatron-fsdp"], "--use-megatron-fsdp: use --zero-stage 3."),
        (
            ["--data-parallel-sharding-strategy", "optim"],
            "--data-parallel-sharding-strategy: use --zero-stage: 0 is no_shard, 1 optim, 2 optim_grads, "
            "3 optim_grads_params.",
        ),
        (["--muon-momentum", "0.9"], "--muon-momentum: muon has its authors' settings; use --optimizer muon alone."),
        (["--optimizer-offload-fraction", "0.5"], "--optimizer-offload-fraction: use --offload-ratio."),
        (
            ["--lr-decay-samples", "100"],
            "--lr-decay-samples: the schedule counts steps; use --lr-decay-iters (samples / global-batch-size).",
        ),
        (
            ["--account-for-loss-in-pipeline-split"],
            "--account-for-loss-in-pipeline-split: layers are cut into stages by cost, embedding and loss included; "
            "remove it.",
        ),
        (
            ["--checkpoint-activations"],
            "--checkpoint-activations: renamed to --recompute-granularity full.",
        ),
        (
            ["--rampup-batch-size", "32", "32", "1000"],
            "--rampup-batch-size: batch-size ramps are not available in this version (and Megatron ignores this flag); "
            "use --global-batch-size.",
        ),
        (
            ["--no-pipeline-parallel"],
            "--no-pipeline-parallel: a pipeline is there only with --pipeline-model-parallel-size above 1; remove it.",
        ),
    ],
)
def test_a_foreign_flag_is_explained_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_run_config(argv)
    assert str(error.value) == message


def test_flags_that_explanations_name_exist() -> None:
    ours = set(build_parser()._option_string_actions)
    named = {
        word.strip(".,;:()")
        for name in MEGATRON
        for word in (explain(f"--{name}") or "").split()
        if word.startswith("--")
    }
    assert named
    assert named - ours == set()


def test_aliases_set_a_field_to_a_value_of_its_type() -> None:
    assert {key for key, _, _ in ALIASES.values()} <= set(FIELDS)
    assert explain_alias("--bf16") == "in a recipe write `precision: bf16` under `training:`."
    assert explain_alias("--disable-bias-linear") == "in a recipe write `add_bias_linear: false` under `model:`."
    assert explain_alias("--group-query-attention") == "in a recipe write num_query_groups under `model:`."
    assert explain_alias("--lr") is None
