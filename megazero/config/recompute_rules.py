"""What the settings of recomputation must be together. The rules of `rules.py` on one section; see there."""

from __future__ import annotations

from collections.abc import Iterator

from megazero.config.fields import FIELDS, value_of
from megazero.config.registry import Rules, show
from megazero.config.schema import ParallelConfig, RunConfig

RECOMPUTE_RULES = Rules()
_rule = RECOMPUTE_RULES.rule

_GRANULARITY = "recompute.recompute_granularity"
_MODULES = "recompute.recompute_modules"
_LAYERS = "recompute.recompute_num_layers"
_PARTITION = "recompute.partition_activations"
_TP = "parallel.tensor_model_parallel_size"


def nothing_to_partition(parallel: ParallelConfig) -> str | None:
    """Why partition_activations has no effect, or None when it has."""
    if parallel.tensor_model_parallel_size == 1:
        return "there are no tensor-parallel ranks"
    return None if parallel.sequence_parallel is False else "sequence parallelism divides them already"


def _besides(config: RunConfig) -> str:
    """`, not --recompute-granularity selective`; empty when none is given."""
    return f", not {show(config, _GRANULARITY)}" if config.recompute.recompute_granularity else ""


@_rule(_LAYERS)
def _whole_blocks(config: RunConfig, world: int | None) -> Iterator[str]:
    options = (
        "recompute.recompute_method",
        _LAYERS,
        _PARTITION,
        "recompute.cpu_checkpointing",
        "recompute.contiguous_memory_optimization",
    )
    for key in options:
        if config.recompute.recompute_granularity != "full" and value_of(config, key) != FIELDS[key].default:
            yield (
                f"{show(config, key)} is for recomputing whole blocks{_besides(config)}. "
                f"Give --recompute-granularity full, or leave it out."
            )


@_rule()
def _parts_of_a_block(config: RunConfig, world: int | None) -> Iterator[str]:
    recompute = config.recompute
    if recompute.recompute_granularity == "selective":
        if not recompute.recompute_modules:
            yield (
                f"{show(config, _GRANULARITY)} with an empty --recompute-modules recomputes nothing. "
                f"Use --recompute-modules core_attn, or leave out --recompute-granularity."
            )
    elif recompute.recompute_modules != FIELDS[_MODULES].default:
        yield (
            f"{show(config, _MODULES)} is for recomputing parts of a block{_besides(config)}. "
            f"Give --recompute-granularity selective, or leave it out."
        )


@_rule()
def _compiled(config: RunConfig, world: int | None) -> Iterator[str]:
    recompute = config.recompute
    parts = recompute.recompute_modules if recompute.recompute_granularity == "selective" else ()
    if config.training.compile and "layernorm" in parts:
        yield (
            f"{show(config, _MODULES)} with {show(config, 'training.compile')}: layernorm's output is let go between "
            f"two operations, which would break a compiled block apart. Leave layernorm out, or use --no-compile."
        )


@_rule(_LAYERS, "model.num_layers")
def _number_of_layers(config: RunConfig, world: int | None) -> Iterator[str]:
    asked, layers = config.recompute.recompute_num_layers, config.model.num_layers
    if asked is not None and asked > layers:
        yield (
            f"{show(config, _LAYERS)} is more than {show(config, 'model.num_layers')}. "
            f"Use --recompute-num-layers {layers} or less."
        )


@_rule(_TP)
def _partition(config: RunConfig, world: int | None) -> Iterator[str]:
    parallel = config.parallel
    if not config.recompute.partition_activations:
        return
    if parallel.tensor_model_parallel_size == 1:
        yield (
            f"{show(config, _PARTITION)} divides between tensor-parallel ranks, and {show(config, _TP)}. "
            f"Use --tensor-model-parallel-size 2 or more, or leave it out."
        )
    elif parallel.sequence_parallel is not False:
        yield (
            f"{show(config, _PARTITION)} has nothing to divide: under sequence parallelism (on by default with "
            f"{show(config, _TP)}) each tensor-parallel rank holds its own part of the inputs already. "
            f"Leave it out, or give --no-sequence-parallel."
        )
