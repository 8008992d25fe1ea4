"""Derived values: what the schema calls "Derived:" and can be computed from other settings and the number of ranks.

    ffn-hidden-size = ceil(8/3 · hidden / 64) · 64 with swiglu (Llama), else 4 · hidden
    data-parallel size = world / (tp · pp · cp)
    global-batch-size = micro-batch-size · gradient-accumulation-steps · data-parallel size

What needs the machine (backend, bucket size), the tokenizer (vocab-size) or a checkpoint (lr-decay-iters) stays None
and is filled in by the one who knows.
"""

from __future__ import annotations

import os.path

from megazero.config.fields import FIELDS, value_of
from megazero.config.layers import Setting, with_settings
from megazero.config.layout import smallest_world_size
from megazero.config.pipeline import virtual_stages
from megazero.config.schema import RunConfig, TrainingConfig


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Replicas of the model over `world_size` ranks, rounded down, at least 1."""
    return max(world_size // smallest_world_size(config), 1)


def derive(config: RunConfig, world_size: int | None) -> RunConfig:
    """A copy with the derivable values filled in and their origin set to `derived: <formula>`.

    `world_size` None: unknown, what depends on it stays None. A value whose inputs make no sense (hidden-size not
    divisible by the heads) stays None too; `rules.find_problems` says why.
    """
    config = _batch(derive_engine(config), world_size)
    for key, value, formula in _model(config):
        config = _fill(config, key, value, formula)
    for key, value, formula in _length(config):
        config = _fill(config, key, value, formula)
    config = _recompute(_parallel(config))
    output_dir = config.logging.output_dir or "runs/default"
    tokenizer = "HuggingFaceTokenizer" if config.data.tokenizer_model else "NullTokenizer"
    for key, text, formula in [
        ("data.tokenizer_type", tokenizer, "from tokenizer-model"),
        ("data.data_cache_path", os.path.join(output_dir, "index-cache"), "under output-dir"),
        ("checkpoint.save", os.path.join(output_dir, "checkpoints"), "under output-dir"),
        ("logging.output_dir", output_dir, "runs/default"),
        ("logging.wandb_exp_name", os.path.basename(os.path.normpath(output_dir)), "name of output-dir"),
    ]:
        config = _fill(config, key, text, formula)
    return config


def derive_engine(config: RunConfig) -> RunConfig:
    """A copy with the derivable values of ZeRO and precision filled in, which need neither model nor ranks."""
    if config.training.autocast != "none" and unset(config, "training.precision"):
        fp32 = Setting("fp32", "derived: autocast keeps weights in fp32")
        config = with_settings(config, {"training.precision": fp32})
    config = _fill(config, "loss_scaling.initial_loss_scale", 2.0**16, "2**16")
    return _fill(config, "parallel.stage3_param_persistence_threshold", 0, "no parameter stays whole")


def _model(config: RunConfig) -> list[tuple[str, int | None, str]]:
    model = config.model
    heads, hidden = model.num_attention_heads, model.hidden_size
    if model.activation == "swiglu":
        ffn, formula = -(-8 * hidden // (3 * 64)) * 64, "8/3 · hidden-size, rounded up to 64s"
    else:
        ffn, formula = 4 * hidden, "4 · hidden-size"
    whole = heads > 0 and hidden % heads == 0
    return [
        ("model.ffn_hidden_size", ffn, formula),
        ("model.num_query_groups", heads, "num-attention-heads"),
        ("model.kv_channels", hidden // heads if whole else None, "hidden-size / num-attention-heads"),
        ("model.max_position_embeddings", config.data.seq_length, "seq-length"),
    ]


def _batch(config: RunConfig, world_size: int | None) -> RunConfig:
    """The batch's numbers from each other; where they do not fit, the rules say so."""
    if not world_size:
        return config
    training, dp = config.training, data_parallel_size(config, world_size)
    accumulation, batch = training.gradient_accumulation_steps, training.global_batch_size
    key = "training.micro_batch_size"
    if accumulation and batch and unset(config, key) and batch % (accumulation * dp) == 0:
        formula = "derived: global-batch-size / (gradient-accumulation-steps · data-parallel size)"
        config = with_settings(config, {key: Setting(batch // (accumulation * dp), formula)})
    factors = "micro-batch-size · gradient-accumulation-steps ·" if accumulation else "micro-batch-size ·"
    batch = config.training.micro_batch_size * (accumulation or 1) * dp
    return _fill(config, "training.global_batch_size", batch, f"{factors} data-parallel size")


def unset(config: RunConfig, key: str) -> bool:
    """Whether nobody has said what this setting, which has a default, shall be."""
    return config.origins.get(key, "default") == "default" and value_of(config, key) == FIELDS[key].default


def _length(config: RunConfig) -> list[tuple[str, int | None, str]]:
    return [("training.train_iters", steps_of_samples(config.training), "train-samples / global-batch-size")]


def steps_of_samples(training: TrainingConfig) -> int | None:
    """The steps that `train_samples` make; None where that or the batch is not known."""
    if training.train_samples is None or training.global_batch_size is None:
        return None
    return training.train_samples // max(training.global_batch_size, 1) or None


def _parallel(config: RunConfig) -> RunConfig:
    split = config.parallel.tensor_model_parallel_size > 1
    config = _fill(config, "parallel.sequence_parallel", split, "tensor-model-parallel-size > 1")
    virtual = virtual_stages(config.parallel, config.model.num_layers)
    config = _fill(config, "parallel.num_virtual_stages_per_pipeline_rank", virtual, "what the schedule needs")
    schedule = "1f1b" if virtual in (None, 1) else "interleaved-1f1b"
    return _fill(config, "parallel.pipeline_schedule", schedule, "from the number of virtual stages")


def _recompute(config: RunConfig) -> RunConfig:
    if config.recompute.recompute_granularity != "full":
        return config
    config = _fill(config, "recompute.recompute_method", "uniform", "every block")
    return _fill(config, "recompute.recompute_num_layers", 1, "one block at a time")


def _fill(config: RunConfig, key: str, value: object, formula: str) -> RunConfig:
    if value is None or value_of(config, key) is not None:
        return config
    return with_settings(config, {key: Setting(value, f"derived: {formula}")})
