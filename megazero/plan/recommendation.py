"""A row of the ladder as what a user writes down: flags of pretrain_gpt.py, or a whole ds_config.json.

row, the ds_config that was given (or none) ─► its keys, and those that the row decides ─► planned again: the row
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megazero.config.schema import RunConfig
from megazero.plan.ladder import Row

_OFFLOADS = ("offload_optimizer", "offload_param")
_FOLDER = "/local_nvme"
"""Stands in for a folder on a local disk."""


def flags_of(row: Row, asked: RunConfig) -> str:
    """The row as flags, beside those that describe the model.

    Args:
        asked: the run before the ladder changed it.
    """
    config = row.config
    stage, *homes = row.choice
    flags = [f"--zero-stage {stage}"]
    for name, where in zip(_OFFLOADS, homes, strict=True):
        if where != "none":
            flags.append(f"--{name.replace('_', '-')} {where}")
        if where == "nvme":
            flags.append(f"--{name.replace('_', '-')}-path {_FOLDER}")
    if config.recompute.recompute_granularity == "full":
        flags.append("--recompute-granularity full")
    flags.append(f"--micro-batch-size {config.training.micro_batch_size}")
    if (config.training.gradient_accumulation_steps or 1) > 1:
        flags.append(f"--gradient-accumulation-steps {config.training.gradient_accumulation_steps}")
    if config.data.seq_length != asked.data.seq_length:
        flags.append(f"--seq-length {config.data.seq_length}")
    return " ".join([*flags, f"--precision {config.training.precision}"])


def ds_config_of(row: Row, asked: RunConfig, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The row as a ds_config: `given`, in which what the row decides has its values.

    Args:
        asked: the run before the ladder changed it. given: the file that was planned, as it was read; None for none.
    """
    config = row.config
    tree: dict[str, Any] = dict(given or {})
    steps = config.training.gradient_accumulation_steps or 1
    tree["train_micro_batch_size_per_gpu"] = config.training.micro_batch_size
    if steps > 1 or "gradient_accumulation_steps" in tree:
        tree["gradient_accumulation_steps"] = steps
    if given is None:
        tree[config.training.precision] = {"enabled": True}
    tree["zero_optimization"] = _zero(row, tree.get("zero_optimization"))
    if config.recompute.recompute_granularity == "full" != asked.recompute.recompute_granularity:
        tree["activation_checkpointing"] = _section(tree, "activation_checkpointing") | {"partition_activations": True}
    return tree


def _section(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = tree.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _zero(row: Row, given: object) -> dict[str, Any]:
    before: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    stage, *homes = row.choice
    section = {"stage": stage} | {key: value for key, value in before.items() if key not in _OLD} | {"stage": stage}
    for name, where in zip(_OFFLOADS, homes, strict=True):
        if where == "none" and not section.get(name):
            continue
        section[name] = _section(section, name) | {"device": where}
        if where == "nvme" and section[name].get("nvme_path") in (None, "auto"):
            section[name]["nvme_path"] = _FOLDER
    return section


_OLD = ("cpu_offload", "cpu_offload_params")
"""Older forms of the offload sections, which these replace."""


def as_lines(tree: Mapping[str, Any]) -> list[str]:
    """JSON with a line for each key of the top."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in tree.items()]
    return [f"{'{' if number == 0 else ' '}{line}," for number, line in enumerate(lines[:-1])] + [
        f"{' ' if len(lines) > 1 else '{'}{lines[-1]}}}"
    ]
