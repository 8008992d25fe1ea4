"""What settings must be together: one small rule each, and `find_problems`, which reports all that fail at once.

A problem is a sentence: the values (with the file they came from), the rule, a remedy with the nearest valid values.
A rule runs only when the values that it reads are in range, so that no problem is reported twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megazero.base.errors import ConfigError
from megazero.config.batch import complete_batch
from megazero.config.context_rules import CONTEXT_RULES
from megazero.config.deepspeed_spelling import respelt
from megazero.config.derive import data_parallel_size, unset
from megazero.config.dry_run_rules import DRY_RUN_RULES
from megazero.config.fields import flag_of, value_of
from megazero.config.layout import (
    either,
    near_divisors,
    neighbours,
    padded_vocab_size,
    parse_split,
    smallest_world_size,
    world_size_problem,
)
from megazero.config.pipeline_rules import PIPELINE_RULES
from megazero.config.ranges import out_of_range, remedy_of
from megazero.config.recompute_rules import RECOMPUTE_RULES
from megazero.config.registry import Rule, Rules, show
from megazero.config.schema import RunConfig
from megazero.config.zero_rules import ZERO_RULES

RULES = Rules()
_rule = RULES.rule

_LAYOUT = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size",
)


def find_problems(config: RunConfig, world_size: int | None) -> list[str]:
    """Every problem of a configuration whose derived values are filled in. `world_size` None: not known yet, the
    rules about it wait."""
    rules = [*RULES, *PIPELINE_RULES, *CONTEXT_RULES, *ZERO_RULES, *RECOMPUTE_RULES, *DRY_RUN_RULES]
    return [respelt(config, problem, only_file=False) for problem in _problems(config, world_size, rules)]


def engine_problems(config: RunConfig) -> list[str]:
    """The same for an engine around any module, whose model and data the configuration does not describe, and which has
    a ds_config and no flags."""
    return [respelt(config, problem, only_file=True) for problem in _problems(config, None, [*ZERO_RULES])]


def _problems(config: RunConfig, world_size: int | None, rules: list[tuple[tuple[str, ...], Rule]]) -> list[str]:
    bad = out_of_range(config)
    problems = [
        f"{show(config, key)}: must be {allowed}. {remedy_of(key)}"
        for key, allowed in bad.items()
        if not config.origins.get(key, "").startswith("derived")  # then its inputs are out of range, and reported
    ]
    for keys, rule in rules:
        if not any(key in bad for key in keys):
            problems += rule(config, world_size)
    return problems


@_rule(*_LAYOUT)
def _world_size(config: RunConfig, world: int | None) -> Iterator[str]:
    parallel = config.parallel
    if world is not None:
        problem = world_size_problem(
            world,
            pp=parallel.pipeline_model_parallel_size,
            cp=parallel.context_parallel_size,
            tp=parallel.tensor_model_parallel_size,
        )
        yield from [problem] if problem else []


@_rule("parallel.expert_model_parallel_size")
def _available_axes(config: RunConfig, world: int | None) -> Iterator[str]:
    key = "parallel.expert_model_parallel_size"
    if value_of(config, key) != 1:
        yield (
            f"{show(config, key)}: the models of pretrain_gpt.py have no experts yet; initialize() spreads those of "
            f"MoE layers. Use {flag_of(key)} 1."
        )


_BATCH = ("training.micro_batch_size", "training.global_batch_size", "training.gradient_accumulation_steps")


@_rule(*_BATCH, *_LAYOUT)
def _global_batch(config: RunConfig, world: int | None) -> Iterator[str]:
    key = "training.global_batch_size"
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    accumulated = config.training.gradient_accumulation_steps is not None
    if batch is None or accumulated or (world is not None and world % smallest_world_size(config)):
        return
    dp = data_parallel_size(config, world) if world is not None else 1
    if batch % (micro * dp):
        yield (
            f"{show(config, key)} is not divisible by micro-batch-size · data-parallel size = {micro} · {dp} = "
            f"{micro * dp}: each step takes whole micro-batches on every replica. "
            f"Use {flag_of(key)} {either(neighbours(batch, micro * dp))}, or another --micro-batch-size."
        )


@_rule(*_BATCH, *_LAYOUT)
def _accumulation(config: RunConfig, world: int | None) -> Iterator[str]:
    training, steps = config.training, config.training.gradient_accumulation_steps
    if steps is None or training.global_batch_size is None or world is None or world % smallest_world_size(config):
        return
    stated = not unset(config, "training.micro_batch_size") and not config.origins.get(
        "training.micro_batch_size", ""
    ).startswith("derived")
    micro = training.micro_batch_size if stated else None
    try:
        complete_batch(training.global_batch_size, micro, steps, data_parallel_size(config, world))
    except ConfigError as error:
        yield str(error)


@_rule("model.num_attention_heads", "model.hidden_size", "model.kv_channels")
def _head_width(config: RunConfig, world: int | None) -> Iterator[str]:
    model = config.model
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"{show(config, 'model.hidden_size')} is not divisible by {show(config, 'model.num_attention_heads')}: "
            f"a head is hidden-size / num-attention-heads wide. Use --hidden-size "
            f"{either(neighbours(model.hidden_size, model.num_attention_heads))}, or set --kv-channels."
        )


@_rule("model.num_attention_heads", "model.num_query_groups")
def _query_groups(config: RunConfig, world: int | None) -> Iterator[str]:
    heads, groups = config.model.num_attention_heads, config.model.num_query_groups
    if groups is not None and heads % groups:
        yield (
            f"{show(config, 'model.num_attention_heads')} is not divisible by "
            f"{show(config, 'model.num_query_groups')}: each key/value head serves equally many query heads. "
            f"Use --num-query-groups {either(near_divisors(heads, groups))}."
        )


@_rule("parallel.tensor_model_parallel_size", "model.num_attention_heads", "model.num_query_groups")
def _heads_over_tp(config: RunConfig, world: int | None) -> Iterator[str]:
    tp = config.parallel.tensor_model_parallel_size
    heads, groups = config.model.num_attention_heads, config.model.num_query_groups
    if heads % tp:
        yield _not_split(config, "model.num_attention_heads", heads, "each rank holds whole heads")
    if groups not in (None, heads) and heads % groups == 0 and groups % tp and tp % groups:
        near = either([*near_divisors(groups, tp)[:1], *neighbours(tp, groups)[-1:]])
        yield (
            f"{show(config, 'model.num_query_groups')} and {show(config, 'parallel.tensor_model_parallel_size')}: one "
            f"must divide the other, so that ranks hold whole key/value heads or equal copies. "
            f"Use --tensor-model-parallel-size {near}."
        )


@_rule("parallel.tensor_model_parallel_size", "model.ffn_hidden_size")
def _ffn_over_tp(config: RunConfig, world: int | None) -> Iterator[str]:
    ffn = config.model.ffn_hidden_size
    if ffn is not None and ffn % config.parallel.tensor_model_parallel_size:
        yield _not_split(config, "model.ffn_hidden_size", ffn, "the MLP is split evenly")


@_rule("parallel.tensor_model_parallel_size", "parallel.context_parallel_size", "data.seq_length")
def _sequence_over_tp(config: RunConfig, world: int | None) -> Iterator[str]:
    parallel, length = config.parallel, config.data.seq_length
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and parallel.context_parallel_size == 1 and length % tp:
        yield (
            f"{show(config, 'data.seq_length')} is not divisible by "
            f"{show(config, 'parallel.tensor_model_parallel_size')}: sequence parallelism splits the tokens evenly. "
            f"Use --seq-length {either(neighbours(length, tp))}, or --no-sequence-parallel."
        )


@_rule("parallel.tensor_model_parallel_size", "model.vocab_size", "model.make_vocab_size_divisible_by")
def _vocab_over_tp(config: RunConfig, world: int | None) -> Iterator[str]:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    divisor = model.make_vocab_size_divisible_by
    if model.vocab_size is not None and padded_vocab_size(model.vocab_size, divisor) % tp:
        yield (
            f"{show(config, 'model.vocab_size')} padded to a multiple of {divisor} is "
            f"{padded_vocab_size(model.vocab_size, divisor)}, which is not divisible by "
            f"{show(config, 'parallel.tensor_model_parallel_size')}: the embedding's rows are split evenly. "
            f"Use --make-vocab-size-divisible-by {math.lcm(divisor, tp)}."
        )


def _not_split(config: RunConfig, key: str, size: int, why: str) -> str:
    tp_key = "parallel.tensor_model_parallel_size"
    tp = config.parallel.tensor_model_parallel_size
    return (
        f"{show(config, key)} is not divisible by {show(config, tp_key)}: {why}. "
        f"Use {flag_of(tp_key)} {either(near_divisors(size, tp))}, or {flag_of(key)} {either(neighbours(size, tp))}."
    )


@_rule("model.kv_channels", "model.rotary_percent")
def _rotary(config: RunConfig, world: int | None) -> Iterator[str]:
    model = config.model
    if model.position_embedding_type != "rope" or model.kv_channels is None:
        return
    rotated = int(model.kv_channels * model.rotary_percent)
    if rotated % 2 or rotated == 0:
        yield (
            f"{show(config, 'model.kv_channels')} and {show(config, 'model.rotary_percent')} rotate {rotated} channels "
            f"of a head: RoPE rotates pairs, so the number must be even and above 0. "
            f"Use --kv-channels {max(model.kv_channels + model.kv_channels % 2, 2)} with --rotary-percent 1, "
            f"or --position-embedding-type none."
        )


@_rule("data.seq_length", "model.max_position_embeddings")
def _positions(config: RunConfig, world: int | None) -> Iterator[str]:
    longest = config.model.max_position_embeddings
    if longest is not None and config.data.seq_length > longest:
        yield (
            f"{show(config, 'data.seq_length')} is above {show(config, 'model.max_position_embeddings')}: samples may "
            f"not be longer than the model accepts. Use --seq-length {longest}, or "
            f"--max-position-embeddings {config.data.seq_length}."
        )


@_rule()
def _data_source(config: RunConfig, world: int | None) -> Iterator[str]:
    data = config.data
    if not data.data_path and not data.mock_data and not config.dry_run.dry_run:
        yield "neither --data-path nor --mock-data is given: a run needs data. Give --data-path PREFIX, or --mock-data."
    if data.data_path and data.mock_data:
        yield f"{show(config, 'data.data_path')} and {show(config, 'data.mock_data')} exclude each other. Give one."
    try:
        parse_split(data.split)
    except ConfigError as error:
        yield str(error)


@_rule()
def _tokenizer(config: RunConfig, world: int | None) -> Iterator[str]:
    data, kind = config.data, config.data.tokenizer_type
    named = show(config, "data.tokenizer_type")
    if kind not in (None, "NullTokenizer") and data.tokenizer_model is None:
        yield f"{named} needs its files. Give --tokenizer-model PATH, or --tokenizer-type NullTokenizer."
    if kind == "NullTokenizer" and data.tokenizer_model is not None:
        yield f"{named} has no files, but {show(config, 'data.tokenizer_model')} is given. Remove one of them."
    if config.model.vocab_size is None and data.tokenizer_model is None:
        yield (
            "the vocabulary's size is unknown: neither --vocab-size nor --tokenizer-model is given. "
            "Give --vocab-size N for --mock-data or ready token ids, else --tokenizer-model PATH."
        )
    if config.training.sample_prompt is not None and data.tokenizer_model is None:
        yield (
            f"{show(config, 'training.sample_prompt')} is text, and there is no tokenizer to read it. "
            f"Give --tokenizer-model PATH, or remove it."
        )


@_rule("training.train_iters", "training.train_samples", "training.global_batch_size")
def _length(config: RunConfig, world: int | None) -> Iterator[str]:
    training = config.training
    derived = config.origins.get("training.train_iters", "").startswith("derived")
    if training.train_iters is None and training.train_samples is None:
        yield "the length of training is unknown. Give --train-iters N, or --train-samples N."
    if training.train_iters is not None and training.train_samples is not None and not derived:
        yield (
            f"{show(config, 'training.train_iters')} and {show(config, 'training.train_samples')} exclude each other. "
            f"Give one."
        )


@_rule("optimizer.lr", "optimizer.min_lr", "optimizer.lr_warmup_init")
def _learning_rates(config: RunConfig, world: int | None) -> Iterator[str]:
    for key in ("optimizer.min_lr", "optimizer.lr_warmup_init"):
        if value_of(config, key) > config.optimizer.lr:
            yield (
                f"{show(config, key)} is above {show(config, 'optimizer.lr')}: the learning rate rises to lr and then "
                f"decays. Use a {flag_of(key)} of at most {config.optimizer.lr}."
            )


@_rule(
    "training.train_iters",
    "optimizer.lr_decay_iters",
    "optimizer.lr_warmup_iters",
    "optimizer.lr_warmup_fraction",
    "optimizer.lr_wsd_decay_iters",
)
def _schedule(config: RunConfig, world: int | None) -> Iterator[str]:
    optimizer = config.optimizer
    decay_key = "optimizer.lr_decay_iters" if optimizer.lr_decay_iters is not None else "training.train_iters"
    decay = value_of(config, decay_key)
    if optimizer.lr_warmup_iters and optimizer.lr_warmup_fraction is not None:
        yield (
            f"{show(config, 'optimizer.lr_warmup_iters')} and {show(config, 'optimizer.lr_warmup_fraction')} exclude "
            f"each other. Give one."
        )
    if decay is None:
        return
    fraction = optimizer.lr_warmup_fraction
    warmup = optimizer.lr_warmup_iters if fraction is None else fraction * decay
    wsd = optimizer.lr_wsd_decay_iters or max(decay // 10, 1)
    if warmup >= decay:
        yield (
            f"{show(config, 'optimizer.lr_warmup_iters')} is not below {show(config, decay_key)}: the warmup must end "
            f"before the decay does. Use --lr-warmup-iters {decay // 10}, or a larger --lr-decay-iters."
        )
    elif optimizer.lr_decay_style == "WSD" and warmup + wsd > decay:
        yield (
            f"--lr-wsd-decay-iters {wsd} does not fit between a warmup of {warmup:g} steps and "
            f"{show(config, decay_key)}: WSD decays at the end. "
            f"Use --lr-wsd-decay-iters {math.floor(decay - warmup)} or less, or a larger --lr-decay-iters."
        )


@_rule("training.train_samples", "training.global_batch_size")
def _enough_samples(config: RunConfig, world: int | None) -> Iterator[str]:
    samples, batch = config.training.train_samples, config.training.global_batch_size
    if samples is not None and batch is not None and samples < batch:
        yield (
            f"{show(config, 'training.train_samples')} is less than the samples of one step: "
            f"{show(config, 'training.global_batch_size')}. Use --train-samples {batch} or more."
        )


@_rule("checkpoint.load")
def _loading(config: RunConfig, world: int | None) -> Iterator[str]:
    if config.checkpoint.finetune and config.checkpoint.load is None:
        yield (
            f"{show(config, 'checkpoint.finetune')} takes the weights of --load, which is not given. "
            f"Give --load DIR, or --no-finetune."
        )
