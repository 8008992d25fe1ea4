"""The run's settings: nested frozen dataclasses, one field = one meaning, with a docstring under each field.

Three spellings of each field: the flag (`--tensor-model-parallel-size`, the field's name with dashes, Megatron's
name where Megatron has one), the recipe key (`parallel.tensor_model_parallel_size`) and, where DeepSpeed has one, the
ds_config.json key (`deepspeed_keys.py`). `None` means "derived": `megazero.config.validate.resolve` fills it in.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TransformerConfig:
    """The decoder: sizes, flavour, vocabulary. Defaults are Llama's."""

    preset: str | None = None
    """Name of a published model whose sizes become the defaults of this section, e.g. `llama3-8b` or `gpt2`."""
    num_layers: int = 12
    """Number of transformer blocks."""
    hidden_size: int = 768
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width inside the MLP. Derived: 8/3 · hidden-size rounded up to a multiple of 64 with swiglu, else 4 · hidden-size."""
    num_attention_heads: int = 12
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key/value heads (GQA; 1 is MQA). Derived: num-attention-heads (MHA)."""
    kv_channels: int | None = None
    """Width of one head. Derived: hidden-size / num-attention-heads."""
    max_position_embeddings: int | None = None
    """Longest sequence that the model accepts. Derived: seq-length."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """How a token knows its position."""
    rotary_base: float = 10000.0
    """Base (theta) of the rotary frequencies."""
    rotary_percent: float = 1.0
    """Share of each head's channels that is rotated."""
    use_rope_scaling: bool = False
    """Llama-3.1's frequency scaling of RoPE for contexts longer than 8192."""
    rope_scaling_factor: float = 8.0
    """Factor of Llama-3.1's RoPE scaling."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Normalization before attention, before the MLP and at the end."""
    norm_epsilon: float = 1e-5
    """Added to the variance inside the norms."""
    activation: Literal["swiglu", "gelu", "gelu_tanh", "squared_relu"] = "swiglu"
    """The MLP's non-linearity; swiglu has a gate, the others do not."""
    add_bias_linear: bool = False
    """Biases on all linear layers of the blocks."""
    add_qkv_bias: bool = False
    """Biases on the query, key and value projections alone (Qwen2)."""
    qk_layernorm: bool = False
    """Normalize each head's queries and keys before RoPE (Qwen3)."""
    untie_embeddings_and_output_weights: bool = True
    """The output projection has weights of its own instead of sharing the token embedding's."""
    hidden_dropout: float = 0.0
    """Dropout after the embedding, the attention and the MLP; equal under any layout."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities; takes an explicit-probability path, slower than the fused kernels."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights; output projections of blocks use std / sqrt(2 · num-layers)."""
    vocab_size: int | None = None
    """Number of token ids. Derived: the tokenizer's size. Needed without a tokenizer (--mock-data)."""
    make_vocab_size_divisible_by: int = 128
    """Embedding rows are padded to a multiple of this; it never depends on the layout and padding rows never enter the softmax."""


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks are divided, and what ZeRO shards between them."""

    tensor_model_parallel_size: int = 1
    """Ranks over which each matrix is split (tp)."""
    pipeline_model_parallel_size: int = 1
    """Ranks over which the layers are split (pp)."""
    context_parallel_size: int = 1
    """Ranks over which each sequence is split (cp)."""
    expert_model_parallel_size: int = 1
    """Ranks over which experts are split (ep)."""
    sequence_parallel: bool | None = None
    """Norms, dropout and residuals split over tp along the sequence. Derived: on when tensor-model-parallel-size > 1."""
    cp_comm_type: Literal["p2p", "a2a"] = "p2p"
    """How attention sees the whole sequence under cp: p2p passes keys and values around a ring, a2a exchanges heads (Ulysses)."""
    pipeline_schedule: (
        Literal["gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv", "dualpipev"] | None
    ) = None
    """Order of forwards and backwards in the pipeline. Derived: 1f1b, or interleaved-1f1b with several virtual stages."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Stages that one rank holds. Derived: 1, or 2 for the schedules that need two."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """The same, said by the number of layers in a stage."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first stage. Derived: what balances cost."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last stage. Derived: what balances cost."""
    pipeline_model_parallel_layout: str | None = None
    """The cut as a string, stages between |: E embedding, t layer, L loss, and `t*3` for three; e.g. `Et*3|t*4|t*4|t*3L`."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 0 replicates; over data-parallel ranks 1 shards the optimizer state, 2 the gradients too, 3 the weights too."""
    grad_accum_dtype: Literal["fp32", "model"] = "fp32"
    """Type in which gradients are kept and reduced; model is the weights' own (DeepSpeed's default, half the bytes in 16 bit)."""
    stage3_prefetch_bucket_size: int | None = None
    """zero-stage 3: elements of weights gathered ahead of their use; without it, the next unit's."""
    stage3_param_persistence_threshold: int | None = None
    """zero-stage 3: parameters of fewer elements stay whole on every rank. Derived: 0, none does."""
    stage3_max_live_parameters: int = 1_000_000_000
    """zero-stage 3: most elements of weights that are whole at a time; prefetching stops there. 0: nothing is fetched ahead."""
    stage3_max_reuse_distance: int = 0
    """zero-stage 3: weights that are used again within this many elements of others stay whole until then; 0 lets all go after use."""
    ddp_bucket_size: int | None = None
    """Largest number of elements that one gradient bucket may hold. Derived: 40 million; a smaller model gets smaller buckets."""
    overlap_grad_reduce: bool = True
    """Start reducing a bucket's gradients while backward still computes others."""
    overlap_param_gather: bool = True
    """Gather updated parameters while the next forward already runs (ZeRO 1 and 2); a script that keeps a list of parameters and reads them after a step needs it off. Off under a ds_config.json."""
    grad_reduce_in_bf16: bool = False
    """Send gradients as bf16 (half the bytes); sums stay fp32 where the backend lets us."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication backend. Derived: nccl on GPUs, gloo on CPUs."""
    distributed_timeout_minutes: float = 10.0
    """After this long without an answer from the other ranks a collective fails."""


@dataclass(frozen=True)
class OffloadConfig:
    """What ZeRO keeps outside the device's memory, and how it gets there and back."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Home of the optimizer's state and fp32 masters, which are updated on the CPU then; needs zero-stage 1 or more."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Home of the weights' shards between uses; needs zero-stage 3."""
    offload_ratio: float = 1.0
    """Share of the optimizer's state that offload-optimizer moves; the rest stays on the device."""
    offload_optimizer_path: str | None = None
    """Folder for offload-optimizer nvme, on a local disk."""
    offload_param_path: str | None = None
    """Folder for offload-param nvme, on a local disk."""
    offload_pin_memory: bool = True
    """Page-locked CPU memory, which a GPU reads and writes while it computes."""
    offload_optimizer_buffer_count: int = 4
    """offload-optimizer nvme: buffers in CPU memory."""
    offload_param_buffer_count: int = 5
    """offload-param nvme: buffers in CPU memory."""
    offload_max_in_cpu: int = 1_000_000_000
    """offload-param nvme: elements of weights that stay in CPU memory before the disk is used."""
    offload_pipeline_read: bool = True
    """offload-optimizer nvme: read the next bucket while this one is updated."""
    offload_pipeline_write: bool = True
    """offload-optimizer nvme: write the last bucket while this one is updated."""
    nvme_block_size: int = 1_048_576
    """Bytes of one read or write."""
    nvme_queue_depth: int = 8
    """Reads and writes on their way at a time."""
    nvme_threads: int = 1
    """Threads for each file that is read or written."""


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes samples."""

    data_path: tuple[str, ...] = ()
    """Prefix of a .bin/.idx pair, or several, optionally each after its weight: `0.7 a 0.3 b`."""
    mock_data: bool = False
    """Deterministic synthetic tokens instead of files; a --data-path flag overrides a recipe's mock data."""
    split: str = "969,30,1"
    """Relative sizes of the train, validation and test parts of each data file."""
    seq_length: int = 1024
    """Tokens in a sample."""
    data_cache_path: str | None = None
    """Folder for sample indices. Derived: `index-cache` under output-dir."""
    reset_position_ids: bool = False
    """Positions start from 0 at each document of a packed sample."""
    reset_attention_mask: bool = False
    """Packed documents do not see each other."""
    eod_mask_loss: bool = False
    """End-of-document tokens do not count in the loss as inputs."""
    tokenizer_type: (
        Literal["HuggingFaceTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer", "NullTokenizer"] | None
    ) = None
    """Kind of tokenizer. Derived: HuggingFaceTokenizer when tokenizer-model is given, else NullTokenizer."""
    tokenizer_model: str | None = None
    """Folder or file of the tokenizer."""


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch, precision, and what to do when something goes wrong."""

    micro_batch_size: int = 1
    """Samples that one rank takes through the model at a time."""
    global_batch_size: int | None = None
    """Samples in one step over all ranks. Derived: micro-batch-size · gradient-accumulation-steps (or 1) · data-parallel size."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches that each rank takes in a step; with global-batch-size it decides micro-batch-size. Without it, what those two make."""
    train_iters: int | None = None
    """Steps to train, counted from the beginning of training."""
    train_samples: int | None = None
    """Samples to train, instead of train-iters."""
    seed: int = 1234
    """Seed of initial weights, data order and dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of weights in forward and backward; masters, sums and optimizer are fp32. auto: bf16 on GPUs, fp32 on CPUs."""
    autocast: Literal["none", "bf16", "fp16"] = "none"
    """torch.autocast in forward: weights stay fp32, and each operation takes the type that is safe for it."""
    autocast_inputs: bool = False
    """Cast the model's floating-point inputs to the weights' type."""
    compile: bool = False
    """Run torch.compile on each block."""
    non_finite: Literal["skip", "raise", "ignore"] = "skip"
    """What to do when a loss or gradient is NaN or infinite."""
    eval_interval: int | None = None
    """Steps between validations; one is also made before the first and after the last step. Derived: none in between."""
    eval_iters: int = 10
    """Global batches in one validation; 0 switches validation off."""
    exit_interval: int | None = None
    """Save and stop at the next step divisible by this."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this many minutes."""
    sample_prompt: str | None = None
    """Text that the trained model continues in samples.txt; needs a tokenizer."""
    sample_tokens: int = 200
    """Number of tokens to generate after sample-prompt."""


@dataclass(frozen=True)
class LossScalingConfig:
    """fp16: the loss is multiplied by a scale, so that small gradients survive, and the gradients are divided by it."""

    loss_scale: float = 0.0
    """A fixed scale; 0 lets the scale adapt."""
    initial_loss_scale: float | None = None
    """The adaptive scale at the start. Derived: 65536 (2**16)."""
    loss_scale_window: int = 1000
    """The adaptive scale doubles after this many steps without overflow."""
    hysteresis: int = 2
    """Overflows before the adaptive scale is halved."""
    consecutive_hysteresis: bool = False
    """A step without overflow starts the count of hysteresis anew."""
    min_loss_scale: float = 1.0
    """The adaptive scale never falls below this; an overflow there is an error."""


@dataclass(frozen=True)
class RecomputeConfig:
    """What is computed again in backward instead of being kept."""

    recompute_granularity: Literal["selective", "full"] | None = None
    """full: whole blocks; selective: the parts named by recompute-modules; without it, nothing is recomputed."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "layernorm"], ...] = ("core_attn",)
    """Parts of a block that selective recomputes."""
    recompute_method: Literal["uniform", "block"] | None = None
    """full: uniform recomputes all blocks, recompute-num-layers at a time; block one by one the first recompute-num-layers of each stage. Derived: uniform."""
    recompute_num_layers: int | None = None
    """See recompute-method. Derived: 1."""
    partition_activations: bool = False
    """full: each tp rank keeps a part of the blocks' inputs (with sequence-parallel they are parts already)."""
    cpu_checkpointing: bool = False
    """full: keep the blocks' inputs in CPU memory (on a CPU they are there already)."""
    contiguous_memory_optimization: bool = False
    """full: keep the blocks' inputs in one buffer made at the first step, which does not fragment memory."""


@dataclass(frozen=True)
class DryRunConfig:
    """Plan a run of any size in one process, without its machines."""

    dry_run: bool = False
    """Validate, build one rank's part on the meta device, print bytes, communication and schedule; exit 1 if it does not fit."""
    world_size: int | None = None
    """Number of ranks to plan for. Derived: the ranks that were started."""
    rank: int = 0
    """The rank whose part is built."""
    device_memory: str = "80GiB"
    """Memory of one device, e.g. 80GiB."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and the learning rate's course."""

    optimizer: Literal["adam", "sgd", "adagrad", "lamb", "lion", "muon", "adam8bit"] = "adam"
    """adam is AdamW (decoupled weight decay), as in Megatron; adam8bit keeps its state in 8 bit."""
    decoupled_weight_decay: bool = True
    """adam, adam8bit: weight decay as AdamW has it; without, it is added to the gradient (torch.optim.Adam)."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """The learning rate never decays below this."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Course of the learning rate after warmup."""
    lr_decay_iters: int | None = None
    """Step at which the decay ends. Derived: train-iters, and then kept by the checkpoint."""
    lr_warmup_iters: int = 0
    """Steps of linear warmup."""
    lr_warmup_fraction: float | None = None
    """Warmup as a share of lr-decay-iters, instead of lr-warmup-iters."""
    lr_warmup_style: Literal["linear", "log"] = "linear"
    """Shape of the warmup; log rises fast at first (DeepSpeed's WarmupLR)."""
    lr_warmup_init: float = 0.0
    """Learning rate of the first warmup step."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the decay at the end of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Length of the decay at the end of WSD. Derived: a tenth of lr-decay-iters."""
    weight_decay: float = 0.1
    """Decoupled weight decay; not applied to biases and other 1-D parameters."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the square root of the second moment."""
    sgd_momentum: float = 0.9
    """Momentum of sgd."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving, resuming, keeping."""

    save: str | None = None
    """Folder for checkpoints. Derived: `checkpoints` under output-dir."""
    save_interval: int | None = None
    """Steps between checkpoints; one is always made at the end. Derived: none in between."""
    load: str | None = None
    """Folder to start from; it must hold a checkpoint. Derived: the run's own `save` folder if that holds one."""
    ckpt_step: int | None = None
    """Iteration of the checkpoint to resume from, in the run's own folder or `load`. Derived: the latest."""
    keep_last: int | None = None
    """Number of checkpoints to keep. Derived: all."""
    finetune: bool = False
    """Take only the weights of `load` and start at iteration 0 with a new optimizer and data order."""
    override_opt_param_scheduler: bool = False
    """Take the learning rate's course from this command instead of the checkpoint (stretches or restarts a decay)."""


@dataclass(frozen=True)
class LoggingConfig:
    """Where the run writes, and what it reports."""

    output_dir: str | None = None
    """Folder that holds everything the run writes: config.yaml, metrics.jsonl, loss.png, checkpoints, samples.txt. Derived: runs/default."""
    log_interval: int = 10
    """Steps between metrics lines."""
    progress: Literal["auto", "plain", "rich"] = "auto"
    """Lines as Megatron prints them, or a progress display; auto: the display on a terminal."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard events."""
    wandb_project: str | None = None
    """Weights & Biases project."""
    wandb_exp_name: str | None = None
    """Weights & Biases run name. Derived: the name of output-dir."""
    wall_clock_breakdown: bool = False
    """Report what forward, backward, communication and optimizer take of a step; the device is waited for at each, which costs time."""
    memory_breakdown: bool = False
    """Report bytes by component: weights, gradients, masters, optimizer state, buckets, activations."""


@dataclass(frozen=True)
class RunConfig:
    """The resolved run. `origins` says where each value came from, by recipe key (`model.num_layers`)."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    loss_scaling: LossScalingConfig = field(default_factory=LossScalingConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    dry_run: DryRunConfig = field(default_factory=DryRunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    origins: dict[str, str] = field(default_factory=dict, compare=False)
