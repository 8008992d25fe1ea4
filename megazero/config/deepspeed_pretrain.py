"""A ds_config beside flags: `pretrain_gpt.py --deepspeed --deepspeed_config ds_config.json --num-layers …`.

    defaults < preset < recipe < ds_config < flags       "auto": from the flags       both say, differently: an error

Optimizer and scheduler become settings of the `optimizer` section; what they leave out has the default of their type,
and gives way to a flag.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megazero.base.errors import ConfigError
from megazero.config.deepspeed import DeepSpeedConfig
from megazero.config.deepspeed_auto import drop_idle_offload
from megazero.config.deepspeed_optimizers import Named
from megazero.config.deepspeed_reading import AUTO, Reading
from megazero.config.deepspeed_report import KeyReport
from megazero.config.fields import flag_of
from megazero.config.layers import RIVALS, Layer, Setting, assemble
from megazero.config.recompute_rules import nothing_to_partition
from megazero.config.schema import ParallelConfig

_BETAS = ("optimizer.adam_beta1", "optimizer.adam_beta2")
_KEYS = {
    "lr": ("optimizer.lr",),
    "betas": _BETAS,
    "eps": ("optimizer.adam_eps",),
    "weight_decay": ("optimizer.weight_decay",),
}
_ADAM: dict[str, Any] = {"betas": [0.9, 0.999], "eps": 1e-8}
TYPES: dict[str, tuple[str, bool | None, dict[str, Any]]] = {
    "adam": ("adam", False, {**_ADAM, "weight_decay": 0.0}),
    "adamw": ("adam", True, {**_ADAM, "weight_decay": 0.01}),
    "fusedadam": ("adam", True, {**_ADAM, "weight_decay": 0.01}),
    "cpuadam": ("adam", True, {**_ADAM, "weight_decay": 0.01}),
    "deepspeedcpuadam": ("adam", True, {**_ADAM, "weight_decay": 0.01}),
    "adam8bit": ("adam8bit", False, {**_ADAM, "weight_decay": 0.0}),
    "adamw8bit": ("adam8bit", True, {**_ADAM, "weight_decay": 0.01}),
    "adagrad": ("adagrad", None, {"weight_decay": 0.0, "eps": 1e-10}),
    "lamb": ("lamb", None, {**_ADAM, "weight_decay": 0.0}),
    "fusedlamb": ("lamb", None, {**_ADAM, "weight_decay": 0.0}),
    "lion": ("lion", None, {"betas": [0.9, 0.99], "weight_decay": 0.0}),
    "fusedlion": ("lion", None, {"betas": [0.9, 0.99], "weight_decay": 0.0}),
    "sgd": ("sgd", None, {"momentum": 0.0, "weight_decay": 0.0}),
    "muon": ("muon", None, {**_ADAM, "weight_decay": 0.1}),
}
"""Type -> --optimizer, decoupled weight decay, defaults of what a flag can say too."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("torch_adam", "set_grad_none", "fused", "foreach", "adamw_mode"), (True, False, None)),
    **dict.fromkeys(("amsgrad", "nesterov", "maximize", "differentiable", "capturable", "eps_inside_sqrt"), (False,)),
    **dict.fromkeys(("dampening", "lr_decay", "initial_accumulator_value"), (0,)),
    "bias_correction": (True,),
    "max_coeff": (10,),
    "min_coeff": (0.01,),
}
"""Parameters that have no flag -> the values that change nothing."""
_COURSES = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
"""Scheduler -> --lr-decay-style."""


def pretraining_layer(
    ds: DeepSpeedConfig, recipe: Sequence[Layer], flags: Layer
) -> tuple[dict[str, Setting], KeyReport]:
    """The layer between recipe and flags that a ds_config makes, and its report.

    Raises ConfigError with every key that contradicts a flag, and for optimizers and schedulers that no flags equal.
    """
    said = Reading(ds.label)
    said.settings.update(ds.settings)
    soft: dict[str, Setting] = {}
    if ds.optimizer is not None:
        _optimizer(said, soft, ds.optimizer)
    if ds.scheduler is not None:
        _scheduler(said, soft, ds.scheduler, lambda: assemble([*recipe, said.settings, flags]).optimizer.lr)
    problems = [*said.problems, *_contradictions(ds.label, said.settings, flags)]
    precision = assemble([*recipe, flags]).training.precision
    if "fp16.enabled" in ds.autos and ds.options.auto_precision == "fp16" and precision in ("auto", "bf16"):
        problems.append(
            f"{ds.label} fp16.enabled is auto and bf16.enabled false, and --precision {precision} means bf16"
            f"{' on a GPU' * (precision == 'auto')}. Give --precision fp16 or fp32, or set fp16.enabled."
        )
    if problems:
        raise ConfigError(*problems)
    layer = {**soft, **said.settings}
    autos = [(path, "auto: from the flags") for path in ds.autos]
    ignored = _without_effect(ds, layer, assemble([*recipe, layer, flags]).parallel)
    report = ds.report.with_translated([*autos, *said.translated]).with_ignored(ignored)
    return layer, replace(report, assumed=tuple((_said_by(ds, soft[key]), _words(soft[key].value)) for key in soft))


def _said_by(ds: DeepSpeedConfig, setting: Setting) -> str:
    return setting.origin.removeprefix(f"{ds.label} ").partition(":")[0]


def _words(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _contradictions(label: str, settings: Layer, flags: Layer) -> list[str]:
    problems = []
    rivals = {a: b for pair in RIVALS for a, b in (pair, pair[::-1])}
    for key, setting in settings.items():
        means = f"{setting.origin} means {flag_of(key)} {_words(setting.value)}"
        flag, rival = flags.get(key), flags.get(rivals.get(key, ""))
        if flag is not None and flag.value != setting.value:
            given = flag.origin.removeprefix("flag ")
            problems.append(
                f"{means}, and {given} says {_words(flag.value)}. "
                f'Make them equal, write "auto" in {label}, or leave one out.'
            )
        elif flag is None and rival is not None:
            problems.append(
                f"{means}, which {rival.origin.removeprefix('flag ')} excludes. "
                f'Write "auto" in {label}, or leave one out.'
            )
    return problems


def _without_effect(ds: DeepSpeedConfig, layer: dict[str, Setting], parallel: ParallelConfig) -> list[tuple[str, str]]:
    """What has a meaning for initialize() and none in pretraining; partitioned activations where nothing is to divide,
    and weights offloaded below stage 3, are taken out of the layer."""
    found = []
    known = {path for path, _ in (*ds.report.used, *ds.report.translated)}
    for path, reason in (
        ("dataloader_drop_last", "the data loader has no last batch: samples never run out"),
        ("pipeline.seed_layers", "initial weights are drawn by parameter name, equal on any layout"),
        ("csv_monitor.enabled", "metrics.jsonl has every line"),
        ("csv_monitor.output_path", "metrics.jsonl has every line"),
        ("csv_monitor.job_name", "metrics.jsonl has every line"),
    ):
        if path in known:
            found.append((path, reason))
    found += drop_idle_offload(layer, parallel.zero_stage)
    partition = layer.get("recompute.partition_activations")
    nothing = nothing_to_partition(parallel)
    if partition is not None and partition.value and nothing:
        layer["recompute.partition_activations"] = partition._replace(value=False)
        found.append(("activation_checkpointing.partition_activations", nothing))
    return found


def _optimizer(said: Reading, soft: dict[str, Setting], named: Named) -> None:
    if named.folded not in TYPES:
        said.problem(
            "optimizer.type",
            f"{named.type} is not one of pretraining's optimizers. Use AdamW, Adam, SGD, Adagrad, Lamb, Lion, Muon or "
            f"AdamW8bit.",
        )
        return
    name, decoupled, defaults = TYPES[named.folded]
    path = "optimizer.type"
    said.set(path, "optimizer.optimizer", name)
    mode = named.params.get("adam_w_mode", named.params.get("decoupled_weight_decay", decoupled))
    if mode is not None:
        said.set(path, "optimizer.decoupled_weight_decay", mode)
    said.translated.append((path, f"--optimizer {name}{'' if mode is not False else ' --no-decoupled-weight-decay'}"))
    momentum = {"momentum": ("optimizer.sgd_momentum",)} if name == "sgd" else {}
    keys = {**_KEYS, **momentum}
    for param, value in named.params.items():
        _parameter(said, named, keys, param, value)
    for param, default in defaults.items():
        if param not in named.params:
            for key, number in zip(keys[param], default if param == "betas" else [default], strict=True):
                soft[key] = Setting(number, f"{said.label} optimizer.params.{param}: default of {named.type}")


def _parameter(said: Reading, named: Named, keys: dict[str, tuple[str, ...]], param: str, value: Any) -> None:
    path = f"optimizer.params.{param}"
    if value == AUTO or param in ("adam_w_mode", "decoupled_weight_decay"):
        return
    if param not in keys:
        if value not in _NEUTRAL.get(param, ()):
            said.problem(path, f"{value} has no flag of pretraining that equals it. Leave it out.")
        return
    numbers = value if param == "betas" else [value]
    if not isinstance(numbers, list | tuple) or len(numbers) != len(keys[param]):
        said.problem(path, f"expected two numbers, got {value!r}. Write [0.9, 0.999], for instance.")
        return
    for key, number in zip(keys[param], numbers, strict=True):
        said.set(path, key, number)


def _scheduler(said: Reading, soft: dict[str, Setting], named: Named, lr: Callable[[], float]) -> None:
    style = _COURSES.get(named.folded)
    if style is None:
        said.problem(
            "scheduler.type",
            f"{named.type} has no equal among --lr-decay-style constant, linear, cosine, inverse-square-root and WSD. "
            f"Remove the section and use these flags, or call megazero.initialize in a script of yours.",
        )
        return
    said.set("scheduler.type", "optimizer.lr_decay_style", style)
    params = dict(named.params)
    linear = style == "linear" or params.get("warmup_type") == "linear"
    later = " (DeepSpeed's own course runs one step behind)" if linear else ""
    said.translated.append(("scheduler.type", f"--lr-decay-style {style}{later}"))
    if params.pop("last_batch_iteration", -1) not in (-1, AUTO):
        said.problem("scheduler.params.last_batch_iteration", "a run begins at -1, or where its checkpoint is. Use -1.")
    cosine = style == "cosine"
    names: dict[str, tuple[str, Any]] = {
        "warmup_num_steps": ("optimizer.lr_warmup_iters", 1000),
        "warmup_type": ("optimizer.lr_warmup_style", "log"),
        "total_num_steps": ("optimizer.lr_decay_iters", None),
    }
    if cosine:
        names |= {"warmup_min_ratio": ("optimizer.lr_warmup_init", 0.0), "cos_min_ratio": ("optimizer.min_lr", 1e-4)}
    else:
        names |= {"warmup_max_lr": ("optimizer.lr", None), "warmup_min_lr": ("optimizer.lr_warmup_init", 0.0)}
    for param, (key, default) in names.items():
        path, value = f"scheduler.params.{param}", params.get(param, default)
        if value is None or value == AUTO:
            continue
        if param in ("warmup_min_ratio", "cos_min_ratio") and isinstance(value, int | float):
            value = value * lr()
        if param in params:
            before = said.settings.get(key)
            if before is not None and before.value != value:
                said.translated.append((before.origin.removeprefix(f"{said.label} "), f"gives way to {path}"))
            said.set(path, key, int(value) if isinstance(value, float) and key.endswith("_iters") else value)
            said.translated.append((path, f"{flag_of(key)} {_words(value)}"))
        else:
            soft[key] = Setting(value, f"{said.label} {path}: default of {named.type}")
    floor = params.get("warmup_min_lr", 0.0)
    if style == "linear" and floor != AUTO:
        said.set("scheduler.params.warmup_min_lr", "optimizer.min_lr", floor)
