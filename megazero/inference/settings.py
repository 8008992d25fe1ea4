"""What `init_inference(model, config, **kwargs)` was asked for, read by one table of DeepSpeed's keys.

config {…} or file ─┐
keyword arguments  ─┴─► each key's path in one spelling ─► used | without effect, and why | not here, a remedy
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megazero.base.errors import ConfigError
from megazero.config.decode import did_you_mean
from megazero.config.deepspeed import DeepSpeedConfig, read_deepspeed
from megazero.config.deepspeed_source import read_tree

Source = str | os.PathLike[str] | Mapping[str, Any]

DTYPES = {
    torch.float32: ("fp32", "float32", "float"),
    torch.bfloat16: ("bf16", "bfloat16"),
    torch.float16: ("fp16", "float16", "half"),
}
"""torch's type -> its names; the first is megazero's."""
ALIASES = {
    "mp_size": "tensor_parallel.tp_size",
    "tp_size": "tensor_parallel.tp_size",
    "tp": "tensor_parallel",
    "max_tokens": "max_out_tokens",
    "min_tokens": "min_out_tokens",
    "kernel_inject": "replace_with_kernel_inject",
    "injection_dict": "injection_policy",
    "ckpt_config": "checkpoint_config",
    "ep": "moe",
    "mp_group": "tensor_parallel.tp_group",
    "mpu": "tensor_parallel.mpu",
}
USED: dict[str, tuple[Any, str]] = {
    "dtype": (object, ""),
    "tensor_parallel.tp_size": (int, "a whole number"),
    "tensor_parallel.enabled": (bool, "true or false"),
    "replace_with_kernel_inject": (bool, "true or false"),
    "injection_policy": (Mapping, "{class of layers: names of its row-parallel linears}"),
    "max_out_tokens": (int, "a whole number"),
    "checkpoint": (str | os.PathLike | Mapping, "a file or folder of weights, or a state dict"),
    "base_dir": (str | os.PathLike, "a folder"),
    "enable_cuda_graph": (bool, "true or false"),
    "zero": (Mapping, "a section as zero_optimization in a ds_config"),
    "aio": (Mapping, "a section as in a ds_config"),
}
"""Key -> its type, in code and in words."""
DEAD = {
    "replace_method": "deprecated; layers are found by the model's plan, or by injection_policy",
    "min_out_tokens": "no workspace is set aside: a cache grows with its sequence",
    "tensor_parallel.tp_grain_size": "ranks hold equal parts of whole heads",
    "triangular_masking": "the model makes its own mask",
    "return_tuple": "the module returns what it returned before",
    "transposed_mode": "weights keep their layout",
    "set_empty_params": "a model is built empty under megazero.zero.Init()",
    "use_triton": "kernels are torch's",
    "triton_autotune": "kernels are torch's",
}
"""Keys without an effect, and why."""
OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "quant": (({}, {"enabled": False}), "give dtype torch.bfloat16 or torch.float16"),
    "moe": (
        (False, {}, {"enabled": False}),
        "leave it out: experts run as the module has them, on every rank",
    ),
    "moe_experts": (([1], 1), "leave it out: experts are not spread over ranks"),
    "moe_type": (("standard",), "leave it out"),
    "ep_size": ((1,), "leave it out: experts are not spread over ranks"),
    "ep_group": ((), "leave it out: experts are not spread over ranks"),
    "ep_mp_group": ((), "leave it out: experts are not spread over ranks"),
    "tensor_parallel.mpu": ((), "give tensor_parallel.tp_size"),
    "tensor_parallel.tp_group": ((), "give tensor_parallel.tp_size"),
    "keep_module_on_host": ((False,), 'give zero={"stage": 3, "offload_param": {"device": "cpu"}}'),
    "training_mp_size": ((1,), "give a checkpoint of whole tensors (engine.save_16bit_model)"),
    "save_mp_checkpoint_path": ((), "leave it out: every rank cuts its part from the whole checkpoint"),
    "checkpoint_config": (({},), "give checkpoint"),
    "injection_policy_tuple": ((), "give injection_policy"),
    "args": ((), "give the values themselves"),
}
"""Key -> the values that ask for nothing, and what to do instead of others. None asks for nothing in any."""
SECTIONS = {path.partition(".")[0] for path in USED if "." in path}


@dataclass(frozen=True)
class InferenceSettings:
    """What was asked for."""

    dtype: torch.dtype | None = None
    """Type of the weights; None: the model's own."""
    tp_size: int = 1
    injection_policy: Mapping[Any, Any] | None = None
    kernel_inject: bool = False
    max_tokens: int | None = None
    """Prompt and new tokens together."""
    checkpoint: Any = None
    base_dir: str | os.PathLike[str] | None = None
    cuda_graph: bool = False
    zero: Mapping[str, Any] = field(default_factory=dict)
    aio: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[tuple[str, str], ...] = ()
    """Keys that have no effect, with the reason."""


def read_settings(config: Source | None, arguments: Mapping[str, Any]) -> InferenceSettings:
    """Join a configuration (mapping, or path of a JSON file) and keyword arguments.

    Raises ConfigError with every problem: unknown keys with the nearest match, values of a wrong type, keys that
    contradict each other, and what is not here, each with a remedy.
    """
    problems: list[str] = []
    found: dict[str, tuple[str, Any]] = {}
    label = "config"
    tree: Mapping[str, Any] = {}
    if config is not None:
        tree, label = read_tree(config)
    for where, given in ((f"{label} ", tree), ("", arguments)):
        for path, written, value in _flat(given, problems):
            before = found.setdefault(path, (where + written, value))
            if before[1] is not value and before[1] != value:
                problems.append(
                    f"init_inference() got {before[0]}={before[1]!r} and {where}{written}={value!r}, which mean the "
                    "same. Give one."
                )
    values = {path: value for path, (_, value) in found.items() if value is not None}
    notes = [(found[path][0], DEAD[path]) for path in values if path in DEAD]
    for path, value in values.items():
        problems += _problems_of(path, found[path][0], value)
    if problems:
        raise ConfigError(*problems)
    return _settings(values, tuple(notes))


def _flat(given: Mapping[str, Any], problems: list[str]) -> list[tuple[str, str, Any]]:
    """(path in the modern spelling, as written, value) of every key."""
    found = []
    for written, value in given.items():
        path = ALIASES.get(written, written)
        if path in SECTIONS:
            if isinstance(value, Mapping):
                found += [(f"{path}.{key}", f"{written}.{key}", inner) for key, inner in value.items()]
            elif value is not None:
                problems.append(f"init_inference(): {written} is a section, as {{'tp_size': 2}}, not {value!r}.")
        else:
            found.append((path, written, value))
    return found


def _problems_of(path: str, written: str, value: Any) -> list[str]:
    if path in DEAD:
        return []
    if path in OFF:
        harmless, remedy = OFF[path]
        fine = any(value == each and type(value) is type(each) for each in harmless)
        return [] if fine else [f"init_inference(): {written}={value!r} is not available; {remedy}."]
    if path not in USED:
        known = [*USED, *DEAD, *OFF, *ALIASES]
        return [f"init_inference(): {written}: unknown key.{did_you_mean(path, known) or ' Remove it.'}"]
    kind, words = USED[path]
    wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is int)
    if wrong:
        return [f"init_inference(): {written}={value!r}: expected {words}."]
    if path == "dtype" and _dtype(value) is None:
        names = ", ".join(f"{dtype} ({names[0]})" for dtype, names in DTYPES.items())
        return [f"init_inference(): dtype={value!r} is not available. Give one of {names}."]
    if kind is int and value < 1:
        return [f"init_inference(): {written}={value}: must be at least 1."]
    return []


def _dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, torch.dtype):
        return value if value in DTYPES else None
    name = str(value).removeprefix("torch.").lower()
    return next((dtype for dtype, names in DTYPES.items() if name in names), None)


def _settings(values: Mapping[str, Any], notes: tuple[tuple[str, str], ...]) -> InferenceSettings:
    on = values.get("tensor_parallel.enabled", True)
    return InferenceSettings(
        dtype=_dtype(values["dtype"]) if "dtype" in values else None,
        tp_size=values.get("tensor_parallel.tp_size", 1) if on else 1,
        injection_policy=values.get("injection_policy"),
        kernel_inject=values.get("replace_with_kernel_inject", False),
        max_tokens=values.get("max_out_tokens"),
        checkpoint=values.get("checkpoint"),
        base_dir=values.get("base_dir"),
        cuda_graph=values.get("enable_cuda_graph", False),
        zero=values.get("zero", {}),
        aio=values.get("aio", {}),
        notes=notes,
    )


def engine_settings(settings: InferenceSettings, dtype: torch.dtype) -> DeepSpeedConfig:
    """The same as a ds_config, for the engine that holds the weights.

    Raises ConfigError for stages that shard only what training has, and for what is wrong in the section `zero`.
    """
    stage = settings.zero.get("stage", 0)
    if stage not in (0, 3):
        raise ConfigError(
            f"init_inference(): zero.stage={stage!r}: stages 1 and 2 divide optimizer state and gradients, which "
            "inference has not got. Give 3, which divides the weights, or 0."
        )
    if settings.zero.get("offload_optimizer"):
        raise ConfigError(
            "init_inference(): zero.offload_optimizer: there is no optimizer here. Give zero.offload_param for "
            "the weights."
        )
    tree: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": dict(settings.zero)}
    if settings.aio:
        tree["aio"] = dict(settings.aio)
    if dtype != torch.float32:
        tree[DTYPES[dtype][0]] = {"enabled": True}
    try:
        return read_deepspeed(tree)
    except ConfigError as error:
        said = [p.replace("config: zero_optimization", "init_inference(): zero") for p in error.problems]
        raise ConfigError(*said) from error
