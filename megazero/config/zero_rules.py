"""What the settings of ZeRO, offload, precision and optimizer must be together. The rules of `rules.py` on one subject;
see there.

`warnings_of` says what works and is seldom wanted.
"""

from __future__ import annotations

from collections.abc import Iterator

from megazero.config.deepspeed_spelling import respelt
from megazero.config.fields import flag_of, value_of
from megazero.config.pipeline import SPLIT_BACKWARD_SCHEDULES
from megazero.config.registry import Rules, show
from megazero.config.schema import RunConfig

ZERO_RULES = Rules()
_rule = ZERO_RULES.rule

_STAGE = "parallel.zero_stage"
_PP = "parallel.pipeline_model_parallel_size"
_TP = "parallel.tensor_model_parallel_size"
_OPTIMIZER = "offload.offload_optimizer"
_PARAM = "offload.offload_param"
_PRECISION = "training.precision"
_AUTOCAST = "training.autocast"

_EFFECTIVE_WITH: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        (
            "parallel.stage3_prefetch_bucket_size",
            "parallel.stage3_param_persistence_threshold",
            "parallel.stage3_max_live_parameters",
            "parallel.stage3_max_reuse_distance",
        ),
        "zero 3",
        "--zero-stage 3",
    ),
    (("offload.offload_ratio",), "offloaded optimizer", "--offload-optimizer cpu"),
    (
        (
            "offload.offload_optimizer_path",
            "offload.offload_optimizer_buffer_count",
            "offload.offload_pipeline_read",
            "offload.offload_pipeline_write",
        ),
        "optimizer on nvme",
        "--offload-optimizer nvme",
    ),
    (
        (
            "offload.offload_param_path",
            "offload.offload_param_buffer_count",
            "offload.offload_max_in_cpu",
        ),
        "parameters on nvme",
        "--offload-param nvme",
    ),
    (
        ("offload.nvme_block_size", "offload.nvme_queue_depth", "offload.nvme_threads"),
        "nvme",
        "--offload-optimizer nvme",
    ),
    (("offload.offload_pin_memory",), "offload", "--offload-optimizer cpu"),
    (
        (
            "loss_scaling.loss_scale",
            "loss_scaling.initial_loss_scale",
            "loss_scaling.loss_scale_window",
            "loss_scaling.hysteresis",
            "loss_scaling.consecutive_hysteresis",
            "loss_scaling.min_loss_scale",
        ),
        "fp16",
        "--precision fp16",
    ),
    (("optimizer.decoupled_weight_decay",), "adam", "--optimizer adam"),
)
"""Keys, what makes them take effect (`_holds`), and the flag that does."""


def _holds(config: RunConfig, what: str) -> bool:
    offload, training = config.offload, config.training
    homes = (offload.offload_optimizer, offload.offload_param)
    return {
        "zero 3": config.parallel.zero_stage == 3,
        "offloaded optimizer": offload.offload_optimizer != "none",
        "optimizer on nvme": offload.offload_optimizer == "nvme",
        "parameters on nvme": offload.offload_param == "nvme",
        "nvme": "nvme" in homes,
        "offload": homes != ("none", "none"),
        "fp16": "fp16" in (training.precision, training.autocast),
        "adam": config.optimizer.optimizer in ("adam", "adam8bit"),
    }[what]


@_rule()
def _no_effect(config: RunConfig, world: int | None) -> Iterator[str]:
    """A recipe or ds_config.json may keep numbers of what is switched off; a flag that has no effect is a mistake."""
    for keys, what, remedy in _EFFECTIVE_WITH:
        for key in keys:
            if config.origins.get(key, "").startswith("flag") and not _holds(config, what):
                yield f"{show(config, key)} has no effect without {remedy}. Give that too, or leave out {flag_of(key)}."


@_rule(_PP)
def _split_backward(config: RunConfig, world: int | None) -> Iterator[str]:
    schedule = config.parallel.pipeline_schedule
    pipeline = config.parallel.pipeline_model_parallel_size > 1
    if config.parallel.zero_stage == 3 and pipeline and schedule in SPLIT_BACKWARD_SCHEDULES:
        yield (
            f"{show(config, _STAGE)} with {show(config, 'parallel.pipeline_schedule')}: it runs each backward in two "
            f"halves, and the weights are let go after the first. Use --zero-stage 2, or --pipeline-schedule 1f1b."
        )


@_rule()
def _offload(config: RunConfig, world: int | None) -> Iterator[str]:
    offload, stage = config.offload, config.parallel.zero_stage
    if offload.offload_optimizer != "none" and stage == 0:
        yield (
            f"{show(config, _OPTIMIZER)} with {show(config, _STAGE)}: each rank offloads its own shard of the "
            f"optimizer's state, and stage 0 has no shards. Use --zero-stage 1, 2 or 3, or --offload-optimizer none."
        )
    if offload.offload_param != "none" and stage != 3:
        yield (
            f"{show(config, _PARAM)} with {show(config, _STAGE)}: weights can only be away between uses when they are "
            f"sharded. Use --zero-stage 3, or --offload-param none."
        )
    for key, path in ((_OPTIMIZER, "offload.offload_optimizer_path"), (_PARAM, "offload.offload_param_path")):
        if value_of(config, key) == "nvme" and value_of(config, path) is None:
            yield (
                f"{show(config, key)} needs a folder on a local disk. Give {flag_of(path)} FOLDER, or use "
                f"{flag_of(key)} cpu."
            )


@_rule()
def _autocast(config: RunConfig, world: int | None) -> Iterator[str]:
    if config.training.autocast != "none" and config.training.precision != "fp32":
        yield (
            f"{show(config, _AUTOCAST)} with {show(config, _PRECISION)}: under autocast the weights stay fp32. "
            f"Use --precision fp32, or --autocast none."
        )


@_rule("loss_scaling.loss_scale", "loss_scaling.initial_loss_scale", "loss_scaling.min_loss_scale")
def _loss_scale(config: RunConfig, world: int | None) -> Iterator[str]:
    scaling = config.loss_scaling
    start_key = "loss_scaling.initial_loss_scale"
    if not _holds(config, "fp16"):
        return
    if scaling.loss_scale:
        if config.origins.get(start_key, "").startswith("flag"):
            yield (
                f"{show(config, 'loss_scaling.loss_scale')} is fixed, and {show(config, start_key)} is where an "
                f"adaptive scale starts. Give one."
            )
    elif scaling.initial_loss_scale is not None and scaling.initial_loss_scale < scaling.min_loss_scale:
        yield (
            f"{show(config, start_key)} is below {show(config, 'loss_scaling.min_loss_scale')}: the scale starts at "
            f"the one and never falls below the other. Use --min-loss-scale {scaling.initial_loss_scale:g} or less."
        )


@_rule(_TP)
def _whole_tensors(config: RunConfig, world: int | None) -> Iterator[str]:
    name = config.optimizer.optimizer
    if name in ("lamb", "muon") and config.parallel.tensor_model_parallel_size > 1:
        yield (
            f"{show(config, 'optimizer.optimizer')} with {show(config, _TP)}: it updates whole matrices, and tensor "
            f"parallelism divides them. Use --optimizer adam, or --tensor-model-parallel-size 1."
        )


def warnings_of(config: RunConfig) -> list[str]:
    """What to know about a resolved configuration that works: one sentence each, to be shown once as a warning."""
    parallel, found = config.parallel, []
    if parallel.zero_stage >= 2 and parallel.pipeline_model_parallel_size > 1:
        what = "gradients are reduced" if parallel.zero_stage == 2 else "weights are gathered and gradients reduced"
        found.append(
            f"{show(config, _STAGE)} with {show(config, _PP)}: {what} once for each micro-batch; --zero-stage 1 "
            f"communicates once a step, if its memory suffices."
        )
    if config.training.precision in ("bf16", "fp16") and parallel.grad_accum_dtype == "model":
        found.append(
            f"{show(config, 'parallel.grad_accum_dtype')} with {show(config, _PRECISION)}: gradients are summed in 16 "
            f"bit over ranks and micro-batches; --grad-accum-dtype fp32 keeps what small ones add."
        )
    return [respelt(config, text, only_file=False) for text in found]
