"""Schedules by name, as ds_config.json writes them: {"type": "WarmupLR", "params": {"warmup_num_steps": 100, …}}."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from megazero.base.errors import ConfigError
from megazero.config.decode import did_you_mean
from megazero.engine.schedulers.cycle import LRRangeTest, OneCycle
from megazero.engine.schedulers.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

_OURS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
_SCHEDULERS = torch.optim.lr_scheduler
_TORCH: dict[str, type[Any]] = {
    name: kind
    for name, kind in vars(_SCHEDULERS).items()
    if isinstance(kind, type) and issubclass(kind, _SCHEDULERS.LRScheduler) and kind is not _SCHEDULERS.LRScheduler
    if not name.startswith("_")
}
_OBJECTS = ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")
"""Those of torch's that a configuration cannot describe: they take functions or schedulers, or a metric each step."""
NAMES: dict[str, str] = {name.lower(): name for name in (*_TORCH, *_OURS) if name not in _OBJECTS}
"""Every name in lower case -> as it is written."""


def make_scheduler(type: str, optimizer: Any, params: Mapping[str, Any] | None = None) -> Any:
    """The scheduler of this name, which sets the learning rates of `optimizer`.

    Args:
        type: one of `NAMES`, in any case.
        optimizer: anything with param_groups for DeepSpeed's schedules; torch's want a torch optimizer, or an object
            whose attribute `optimizer` is one.
        params: arguments of the class.

    Raises ConfigError for an unknown name or argument, a missing one, and values that the class refuses.
    """
    params, folded = dict(params or {}), str(type).lower()
    if folded in (name.lower() for name in _OBJECTS):
        raise ConfigError(
            f"scheduler type {type!r} takes functions, other schedulers or a metric, which a configuration cannot "
            "give. Make it in your script and pass it as lr_scheduler."
        )
    if folded not in NAMES:
        raise ConfigError(
            f"scheduler type {type!r} is unknown.{did_you_mean(str(type), NAMES.values())} There are "
            f"{', '.join(sorted(NAMES.values(), key=str.lower))}."
        )
    name = NAMES[folded]
    kind = _OURS.get(name) or _TORCH[name]
    _check_arguments(name, kind, params)
    if name not in _OURS and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = getattr(optimizer, "optimizer", optimizer)
    try:
        return kind(optimizer, **params)
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        shown = ", ".join(f"{key} {value}" for key, value in params.items()) or "its defaults"
        raise ConfigError(f"scheduler {name} with {shown}: {error}") from error


def _check_arguments(name: str, kind: Any, params: Mapping[str, Any]) -> None:
    accepted = dict(list(inspect.signature(kind).parameters.items())[1:])
    problems = [
        f"scheduler {name} has no argument {given!r}.{did_you_mean(given, accepted)} It takes {', '.join(accepted)}."
        for given in params
        if given not in accepted
    ]
    problems += [
        f"scheduler {name} needs {wanted}. State it."
        for wanted, parameter in accepted.items()
        if parameter.default is parameter.empty and wanted not in params
    ]
    problems += [
        f"scheduler {name} with {given} 'auto': it was not resolved. State a number."
        for given, value in params.items()
        if value == "auto"
    ]
    if problems:
        raise ConfigError(*problems)
