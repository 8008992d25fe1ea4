"""Problems in the words of who wrote a ds_config.json: keys of the file in place of flags.

    --zero-stage 2 (ds_config.json zero_optimization.stage)   ─►  zero_optimization.stage 2 (ds_config.json)
    Use --zero-stage 3, or --precision fp32.                  ─►  Use zero_optimization.stage 3, or bf16.enabled false …

Rules speak flags; where a value came from decides here how it is named. A setting that nobody gave is named as those
beside it in the sentence are.
"""

from __future__ import annotations

import math
import re
from typing import Any

from megazero.config.deepspeed_keys import ALIASES, TABLE, To
from megazero.config.fields import FIELDS, value_of
from megazero.config.registry import show
from megazero.config.schema import RunConfig

PATHS: dict[str, str] = {
    **{key: path for path, entry in reversed(TABLE.items()) if isinstance(entry, To) for key in entry.keys},
    "training.precision": "bf16.enabled",
    "training.autocast": "torch_autocast.enabled",
    "parallel.grad_accum_dtype": "data_types.grad_accum_dtype",
    "parallel.expert_model_parallel_size": "moe.ep_size",
    "offload.offload_pin_memory": "zero_optimization.offload_optimizer.pin_memory",
    "optimizer.optimizer": "optimizer.type",
    "optimizer.lr": "optimizer.params.lr",
    "recompute.partition_activations": "activation_checkpointing.partition_activations",
}
"""Recipe key -> its path in a ds_config."""
_WHOLE = {
    "--precision fp32": "fp16.enabled and bf16.enabled false",
    "--precision bf16": "bf16.enabled true",
    "--precision fp16": "fp16.enabled true",
    "--autocast none": "torch_autocast.enabled false",
    "--optimizer adam": "optimizer.type AdamW",
}
"""Remedies whose value is written otherwise too."""
_KEYS = {field.flag: key for key, field in FIELDS.items()}
_FLAG = re.compile(r"--(?P<no>no-)?(?P<flag>[a-z][a-z0-9-]*)(?P<value> (?:fp32|bf16|fp16|none|adam)\b)?")


def respelt(config: RunConfig, problem: str, only_file: bool) -> str:
    """A problem of this configuration, with settings named as its user wrote them.

    Args:
        only_file: there is no command line: the ds_config is all that the user can change.
    """
    in_file = only_file
    for key, origin in config.origins.items():
        place = written(origin)
        if place is not None and show(config, key) in problem:
            path = f"{place[1]} {_json(place[1], value_of(config, key))} ({place[0]})"
            problem, in_file = problem.replace(show(config, key), path), True

    def name(match: re.Match[str]) -> str:
        flag, value = match["flag"], match["value"] or ""
        key = _KEYS.get(f"--{flag}", "")
        origin = config.origins.get(key, "default")
        own = written(origin)
        nobodys = origin == "default" or origin.startswith("derived")
        if key not in PATHS or not (own or (nobodys and in_file)):
            return match[0]
        if match[0] in _WHOLE:
            return _WHOLE[match[0]]
        path = own[1] if own and _modern(own[1]) == PATHS[key] else PATHS[key]
        return f"{path} {'false' if match['no'] else 'true'}" if FIELDS[key].is_switch else f"{path}{value}"

    return _FLAG.sub(name, problem)


def written(origin: str) -> tuple[str, str] | None:
    """Name of the ds_config and path in it of a setting's origin; None when it is from elsewhere."""
    label, _, path = origin.partition(": ")[0].rpartition(" ")
    known = _modern(path) in TABLE or path.partition(".")[0] in ("optimizer", "scheduler")
    return (label, path) if label and known else None


def _modern(path: str) -> str:
    for old, new in ALIASES.items():
        if path == old or path.startswith(f"{old}."):
            path = new + path.removeprefix(old)
    return path


def _json(path: str, value: Any) -> str:
    """A setting's value as it stands at this path, more or less."""
    entry = TABLE.get(_modern(path))
    if value == "auto":
        return '"auto"'
    if path.endswith("initial_scale_power"):
        return f"{math.log2(value):g}"
    if (entry is not None and getattr(entry, "kind", None) is bool) or isinstance(value, bool):
        off = (False, None, "none", "ignore", 1, *(() if path.startswith("torch_autocast") else ("fp32",)))
        return "true" if value is True or value not in off else "false"
    return str(value)
