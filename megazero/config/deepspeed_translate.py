"""Keys of a ds_config that mean something only together: precision, offload, tensor and expert parallelism,
recomputation, pipelines, monitors.

Each function takes its values out of the reading and leaves settings, lines of the report, and problems.
"""

from __future__ import annotations

import math
import os.path
from dataclasses import dataclass, field
from typing import Any, Literal

from megazero.config.deepspeed_reading import AUTO, Reading

_WIDTHS = {
    "fp32": "fp32",
    "float32": "fp32",
    "bf16": "bf16",
    "bfp16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
}


@dataclass(frozen=True)
class Options:
    """What a ds_config says that is no setting of a run, but of what is around the engine."""

    monitors: dict[str, dict[str, str]] = field(default_factory=dict)
    """tensorboard, wandb, csv_monitor, those that are enabled -> their options (output_path, job_name, project)."""
    seed_layers: bool | None = None
    """pipeline.seed_layers, for a PipelineModule."""
    activation_checkpoint_interval: int | None = None
    """pipeline.activation_checkpoint_interval, for a PipelineModule; 0 recomputes nothing."""
    dataloader_drop_last: bool = False
    """Leave the last samples out that fill no batch."""
    steps_per_print: int | None = None
    """Steps between lines; None: no lines."""
    auto_precision: Literal["bf16", "fp16"] = "bf16"
    """What a precision "auto" is on a GPU: fp16 where the file says no to bf16."""


def translate(reading: Reading) -> Options:
    """Translate all values that `read_keys` kept."""
    _precision(reading)
    _gradient_types(reading)
    _offload(reading)
    _tensor_parallel(reading)
    _experts(reading)
    interval = _recompute(reading)
    values = reading.values
    seed = _take(reading, "pipeline.seed_layers", "PipelineModule's layers")
    return Options(
        monitors=_monitors(reading),
        seed_layers=seed,
        activation_checkpoint_interval=interval,
        dataloader_drop_last=bool(_take(reading, "dataloader_drop_last", "the data loader")),
        steps_per_print=_steps_per_print(reading, values.get("steps_per_print")),
        auto_precision="fp16" if values.get("bf16.enabled") is False else "bf16",
    )


def _take(reading: Reading, path: str, what: str) -> Any:
    """A value that goes on as it is; "auto" is as if it was left out."""
    value = reading.values.get(path)
    if value is not None:
        reading.used.append((path, what))
    return None if value == AUTO else value


def _precision(reading: Reading) -> None:
    asked = {name: reading.values.get(f"{name}.enabled") for name in ("fp16", "bf16")}
    autocast = reading.values.get("torch_autocast.enabled")
    key = "training.precision"
    on = [name for name, value in asked.items() if value is True]
    if len(on) == 2:
        reading.problem("fp16.enabled", "true, and bf16.enabled too: weights have one type. Set one to false.")
        return
    for name in on:
        reading.set(f"{name}.enabled", key, name)
    if not on and set(asked.values()) == {False}:
        reading.set("bf16.enabled", key, "fp32")
    for name, value in asked.items():
        path = f"{name}.enabled"
        if value == AUTO and not on:
            reading.autos[path] = (key,)
        elif value == AUTO:
            reading.translated.append((path, f"auto: off, as {on[0]} is on"))
        elif value is not None:
            reading.used.append((path, key))
    if autocast is not None:
        kind = reading.values.get("torch_autocast.dtype", "bfloat16")
        kind = "bf16" if kind == AUTO else _WIDTHS[kind]
        on_now = autocast is True
        reading.set("torch_autocast.enabled", "training.autocast", kind if on_now else "none")
        text = f"training.autocast = {kind}, weights fp32" if on_now else "is off"
        reading.translated.append(("torch_autocast.enabled", text))
        if on_now and key not in reading.settings:
            reading.set("torch_autocast.enabled", key, "fp32")
            for name in ("fp16", "bf16"):
                reading.autos.pop(f"{name}.enabled", None)
    if "torch_autocast.dtype" in reading.values:
        reading.used.append(("torch_autocast.dtype", "training.autocast"))


def _gradient_types(reading: Reading) -> None:
    path, kind = "data_types.grad_accum_dtype", reading.values.get("data_types.grad_accum_dtype")
    setting = reading.settings.get("training.precision")
    if kind == AUTO:
        reading.autos[path] = ("parallel.grad_accum_dtype",)
    elif kind is not None and _WIDTHS[kind] == "fp32":
        reading.set(path, "parallel.grad_accum_dtype", "fp32")
        reading.used.append((path, "parallel.grad_accum_dtype"))
    elif kind is not None and setting is not None and setting.value == _WIDTHS[kind]:
        reading.set(path, "parallel.grad_accum_dtype", "model")
        reading.translated.append((path, "parallel.grad_accum_dtype = model, the weights' own type"))
    elif kind is not None:
        weights = setting.value if setting is not None else "of a type that is not said"
        reading.problem(
            path, f"{kind}, but weights are {weights}: gradients are kept in fp32 or in the weights' type. Use fp32."
        )
    path, kind = "communication_data_type", reading.values.get("communication_data_type")
    if kind is not None and kind != AUTO:
        reading.set(path, "parallel.grad_reduce_in_bf16", _WIDTHS[kind] == "bf16")
        if _WIDTHS[kind] == "fp16":
            reading.translated.append((path, "gradients travel in fp32: sums in fp16 overflow; bf16 halves the bytes"))
        else:
            reading.used.append((path, "parallel.grad_reduce_in_bf16"))
    elif kind == AUTO:
        reading.autos[path] = ("parallel.grad_reduce_in_bf16",)


def _offload(reading: Reading) -> None:
    values = reading.values
    for old, key in (("cpu_offload", "offload.offload_optimizer"), ("cpu_offload_params", "offload.offload_param")):
        path = f"zero_optimization.{old}"
        value = values.get(path)
        if value is True and key in reading.settings:
            reading.problem(path, f"stands beside {key.rpartition('.')[2]}, its newer form. Remove {old}.")
        elif value is not None:
            reading.set(path, key, "cpu" if value is True else reading.settings.get(key, ("none",))[0])
            newer = key.rpartition(".")[2]
            reading.translated.append((path, f"{newer} {'to the cpu' if value is True else 'is not asked for by it'}"))
    pins = {
        path: values[path]
        for path in (
            "zero_optimization.offload_optimizer.pin_memory",
            "zero_optimization.offload_param.pin_memory",
            "zero_optimization.cpu_offload_use_pin_memory",
        )
        if path in values
    }
    said = [value for value in pins.values() if value != AUTO]
    for path in pins:
        if said and len(set(said)) > 1:
            reading.translated.append((path, "one setting pins all: off, as one section says"))
        elif said:
            reading.used.append((path, "offload.offload_pin_memory"))
        else:
            reading.autos[path] = ("offload.offload_pin_memory",)
    if said:
        path = next(path for path, value in pins.items() if value != AUTO)
        reading.set(path, "offload.offload_pin_memory", all(said))


def _tensor_parallel(reading: Reading) -> None:
    path, key = "tensor_parallel.enabled", "parallel.tensor_model_parallel_size"
    enabled = reading.values.get(path)
    if enabled is False:
        reading.set(path, key, 1)
    if enabled is not None:
        reading.used.append((path, key))


def _experts(reading: Reading) -> None:
    key = "parallel.expert_model_parallel_size"
    paths = ("moe_expert_parallel_size", "moe.ep_size")
    given = {path: reading.values[path] for path in paths if reading.values.get(path) not in (None, AUTO)}
    enabled = reading.values.get("moe.enabled")
    if len(set(given.values())) > 1:
        reading.problem("moe.ep_size", f"{given[paths[1]]} contradicts {paths[0]}: {given[paths[0]]}. Make them equal.")
        return
    for path, size in given.items():
        reading.set(path, key, 1 if enabled is False else size)
        reading.translated.append((path, f"{key} = {1 if enabled is False else size}"))
    if enabled is not None:
        reading.used.append(("moe.enabled", key))


def _recompute(reading: Reading) -> int | None:
    """Returns the interval at which a PipelineModule's layers are recomputed, if it is said."""
    named = {
        f"activation_checkpointing.{name}": f"recompute.{name}"
        for name in ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization")
    }
    granularity = "recompute.recompute_granularity"
    for path, key in named.items():
        value = reading.values.get(path)
        if value is True:
            reading.set(path, granularity, "full")
            reading.set(path, key, True)
            reading.translated.append((path, f"{key}, with {granularity} = full"))
        elif value is not None:
            reading.used.append((path, key))
    path = "pipeline.activation_checkpoint_interval"
    interval = reading.values.get(path)
    if interval in (None, AUTO):
        return None
    if interval < 0:
        reading.problem(path, f"{interval} is out of range: it must be at least 0. Use 0 to recompute nothing.")
    elif interval:
        reading.set(path, granularity, "full")
        reading.set(path, "recompute.recompute_method", "uniform")
        reading.set(path, "recompute.recompute_num_layers", interval)
        reading.translated.append((path, f"{granularity} = full, {interval} at a time"))
    else:
        reading.used.append((path, granularity))
    return int(interval)


def _monitors(reading: Reading) -> dict[str, dict[str, str]]:
    defaults = {
        "tensorboard": {"output_path": "runs", "job_name": "megazero"},
        "wandb": {"project": "megazero"},
        "csv_monitor": {"output_path": "runs", "job_name": "megazero"},
    }
    found: dict[str, dict[str, str]] = {}
    for name, options in defaults.items():
        on = reading.values.get(f"{name}.enabled") is True
        for option in ("enabled", *options):
            path = f"{name}.{option}"
            if path in reading.values:
                reading.used.append((path, name if on else "is off"))
        if on:
            given = {option: str(reading.values.get(f"{name}.{option}", "")) for option in options}
            found[name] = {
                option: given[option] if given[option] not in ("", AUTO) else default
                for option, default in options.items()
            }
    if "tensorboard" in found:
        folder = os.path.join(*found["tensorboard"].values())
        reading.set("tensorboard.output_path", "logging.tensorboard_dir", folder)
    if "wandb" in found:
        reading.set("wandb.project", "logging.wandb_project", found["wandb"]["project"])
    return found


def _steps_per_print(reading: Reading, value: Any) -> int | None:
    path = "steps_per_print"
    if value is None:
        return None
    if value == AUTO:
        reading.translated.append((path, "auto: every 10 steps"))
        return 10
    if value == 0 or math.isinf(value):
        reading.translated.append((path, "no lines"))
        return None
    if value != int(value) or value < 0:
        reading.problem(path, f"expected a whole number, got {value}. Use 10, for instance, or 0 for no lines.")
        return None
    reading.set(path, "logging.log_interval", int(value))
    reading.used.append((path, "logging.log_interval"))
    return int(value)
