"""What the settings of a pipeline must be together. The rules of `rules.py` on one axis; see there.

Limits of the schedules are those of torch.distributed.pipelining (schedules.py, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator

from megazero.base.errors import ConfigError
from megazero.config.derive import data_parallel_size
from megazero.config.fields import flag_of, value_of
from megazero.config.layout import either, smallest_world_size
from megazero.config.pipeline import (
    LOOPED_SCHEDULES,
    SPLIT_BACKWARD_SCHEDULES,
    V_SCHEDULES,
    micro_batches,
    parse_layout,
)
from megazero.config.registry import Rules, show
from megazero.config.schema import RunConfig

PIPELINE_RULES = Rules()
_rule = PIPELINE_RULES.rule

_PP = "parallel.pipeline_model_parallel_size"
_VIRTUAL = "parallel.num_virtual_stages_per_pipeline_rank"
_EACH = "parallel.num_layers_per_virtual_pipeline_stage"
_LAYOUT = "parallel.pipeline_model_parallel_layout"
_FIRST = "parallel.decoder_first_pipeline_num_layers"
_LAST = "parallel.decoder_last_pipeline_num_layers"
_SCHEDULE = "parallel.pipeline_schedule"
_LAYERS = "model.num_layers"


def _given(config: RunConfig, *keys: str) -> list[str]:
    """Those of the keys that a user has set."""
    derived = {key for key in keys if config.origins.get(key, "").startswith("derived")}
    return [key for key in keys if key not in derived and value_of(config, key) is not None]


@_rule(_PP, _VIRTUAL, _EACH, _FIRST, _LAST)
def _only_with_a_pipeline(config: RunConfig, world: int | None) -> Iterator[str]:
    if config.parallel.pipeline_model_parallel_size > 1:
        return
    harmless = {_SCHEDULE: "1f1b", _VIRTUAL: 1}
    for key in _given(config, _SCHEDULE, _VIRTUAL, _EACH, _LAYOUT, _FIRST, _LAST):
        if value_of(config, key) != harmless.get(key):
            remedy = f"use {flag_of(key)} {harmless[key]}" if key in harmless else "leave it out"
            yield f"{show(config, key)} needs a pipeline, not {show(config, _PP)}. Use 2 or more, or {remedy}."


@_rule(_PP, _VIRTUAL, _EACH, _FIRST, _LAST, _LAYERS)
def _one_way_to_cut(config: RunConfig, world: int | None) -> Iterator[str]:
    for ways in ((_VIRTUAL, _EACH, _LAYOUT), (_EACH, _FIRST), (_EACH, _LAST), (_LAYOUT, _FIRST), (_LAYOUT, _LAST)):
        given = _given(config, *ways)
        if len(given) > 1:
            yield f"{' and '.join(show(config, key) for key in given)} both say how layers are cut. Give one."


@_rule(_PP, _VIRTUAL, _EACH, _FIRST, _LAST, _LAYERS)
def _layout(config: RunConfig, world: int | None) -> Iterator[str]:
    text, pp, layers = (
        config.parallel.pipeline_model_parallel_layout,
        config.parallel.pipeline_model_parallel_size,
        config.model.num_layers,
    )
    if text is None or pp == 1:
        return
    try:
        stages = parse_layout(text)
    except ConfigError as error:
        yield str(error)
        return
    written = sum(stage.layers for stage in stages)
    if len(stages) % pp:
        yield (
            f"{show(config, _LAYOUT)} has {len(stages)} stages, which is not a multiple of {show(config, _PP)}: each "
            f"rank holds equally many. Write {either(_multiples(len(stages), pp))} stages."
        )
    if written != layers:
        yield (
            f"{show(config, _LAYOUT)} has {written} layers t, and {show(config, _LAYERS)}: each layer is in one stage. "
            f"Write {layers} of them, or use --num-layers {written}."
        )


def _multiples(number: int, step: int) -> list[int]:
    below = number // step * step
    return [below, below + step] if below else [step]


@_rule(_PP, _VIRTUAL, _EACH, _LAYERS)
def _enough_layers(config: RunConfig, world: int | None) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    pp, each, virtual = (
        parallel.pipeline_model_parallel_size,
        parallel.num_layers_per_virtual_pipeline_stage,
        parallel.num_virtual_stages_per_pipeline_rank,
    )
    if pp == 1 or parallel.pipeline_model_parallel_layout is not None:
        return
    if each is not None and layers % (pp * each):
        near = [n for n in range(1, layers // pp + 1) if layers % (pp * n) == 0]
        remedy = f"Use {flag_of(_EACH)} {either(_nearest(near, each))}" if near else "Leave it out"
        yield (
            f"{show(config, _EACH)}: {show(config, _LAYERS)} is not a multiple of it times {show(config, _PP)} = "
            f"{pp * each}. {remedy}, or another --num-layers."
        )
    elif virtual is not None and layers < pp * virtual:
        fewer = f"--pipeline-model-parallel-size {max(layers // virtual, 1)}"
        if layers >= pp and parallel.pipeline_schedule not in V_SCHEDULES:
            fewer += f", or {flag_of(_VIRTUAL)} {layers // pp}"
        yield (
            f"{show(config, _LAYERS)} is less than the stages: {show(config, _PP)} times {virtual} on each rank = "
            f"{pp * virtual}, and each holds a layer. Use {fewer}."
        )


def _nearest(numbers: list[int], wanted: int) -> list[int]:
    return [n for n in numbers if n < wanted][-1:] + [n for n in numbers if n > wanted][:1]


@_rule(_PP, _VIRTUAL, _FIRST, _LAST, _LAYERS)
def _first_and_last(config: RunConfig, world: int | None) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    given = _given(config, _FIRST, _LAST)
    if parallel.pipeline_model_parallel_size == 1 or parallel.num_virtual_stages_per_pipeline_rank is None or not given:
        return
    stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    rest, between = layers - sum(value_of(config, key) for key in given), stages - len(given)
    if layers >= stages and (rest < between or (between == 0 and rest)):
        names = " and ".join(show(config, key) for key in given)
        rule = (
            f"the {between} other stages hold at least one each" if between else "there is no other stage to hold them"
        )
        remedy = f"at most {layers - between} together" if between else f"{layers} together"
        yield f"{names} leave {rest} of {show(config, _LAYERS)}: {rule}. Make them {remedy}."


@_rule(_PP, _VIRTUAL, _EACH)
def _virtual_stages(config: RunConfig, world: int | None) -> Iterator[str]:
    parallel = config.parallel
    schedule, virtual = parallel.pipeline_schedule, parallel.num_virtual_stages_per_pipeline_rank
    if parallel.pipeline_model_parallel_size == 1 or virtual is None:
        return
    held = f"{show(config, _SCHEDULE)} with {virtual} stage{'s' * (virtual > 1)} on each rank"
    if schedule in V_SCHEDULES and virtual != 2:
        yield f"{held}: tokens go down the ranks and up again, so each holds exactly 2. Use {flag_of(_VIRTUAL)} 2."
    elif schedule == "interleaved-1f1b" and virtual == 1:
        yield f"{held}: nothing to interleave. Use {flag_of(_VIRTUAL)} 2 or more, or {flag_of(_SCHEDULE)} 1f1b."
    elif schedule in ("gpipe", "1f1b") and virtual > 1:
        yield f"{held}: it knows one stage a rank. Use {flag_of(_SCHEDULE)} interleaved-1f1b, or {flag_of(_VIRTUAL)} 1."


@_rule(
    _PP,
    _VIRTUAL,
    _EACH,
    "parallel.tensor_model_parallel_size",
    "parallel.context_parallel_size",
    "training.micro_batch_size",
    "training.global_batch_size",
)
def _micro_batches(config: RunConfig, world: int | None) -> Iterator[str]:
    parallel, schedule = config.parallel, config.parallel.pipeline_schedule
    pp, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if pp == 1 or world is None or world % smallest_world_size(config):
        return
    dp, size = data_parallel_size(config, world), config.training.micro_batch_size
    number = micro_batches(config, dp)
    if number is None or virtual is None:
        return
    least = {"1f1b": pp, "dualpipev": 2 * pp}.get(str(schedule), 1)
    held = (
        f"{show(config, 'training.global_batch_size')} makes {number} micro-batch{'es' * (number > 1)} of {size} on "
        f"each of {dp} replica{'s' * (dp > 1)}"
    )
    if number < least:
        stages = "stages" if schedule == "1f1b" else "stages (two on each rank)"
        yield (
            f"{held}, and {show(config, _SCHEDULE)} with {least} {stages} needs at least as many as stages. "
            f"Use --global-batch-size {least * size * dp}, or --pipeline-schedule gpipe."
        )
    rounds = max(number // pp, 1)
    if schedule in LOOPED_SCHEDULES and number % rounds:
        good = [n for n in range(1, number + 2 * pp) if n % max(n // pp, 1) == 0]
        yield (
            f"{held}, and {show(config, _SCHEDULE)} runs {rounds} rounds of at least {show(config, _PP)}: they must be "
            f"equally long. Use --global-batch-size {either([n * size * dp for n in _nearest(good, number)])}."
        )


@_rule(_PP)
def _split_backward(config: RunConfig, world: int | None) -> Iterator[str]:
    schedule = config.parallel.pipeline_schedule
    if (
        config.parallel.pipeline_model_parallel_size > 1
        and schedule in SPLIT_BACKWARD_SCHEDULES
        and config.training.compile
    ):
        yield (
            f"{show(config, 'training.compile')} with {show(config, _SCHEDULE)}: it runs each backward in two halves, "
            f"which compiled blocks cannot. Use --no-compile, or --pipeline-schedule 1f1b."
        )
