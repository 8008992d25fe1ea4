"""Optimizers by name, as ds_config.json writes them: {"type": "AdamW", "params": {"lr": 3e-4, …}}.

Names mean what torch means, whatever their case: Adam is torch.optim.Adam unless `adam_w_mode` is true. Arguments are
checked against the class, so that a misspelt one is an error with the nearest match.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megazero.base.errors import ConfigError
from megazero.config.decode import did_you_mean
from megazero.engine.optimizers.eight_bit import adam_8bit
from megazero.engine.optimizers.fused import SGD, Adagrad, Adam, AdamW, CPUAdam, FusedAdam, check_bias_correction
from megazero.engine.optimizers.lamb import Lamb
from megazero.engine.optimizers.lion import Lion
from megazero.engine.optimizers.muon import Muon

Maker = Callable[..., torch.optim.Optimizer]

_CLASSES: dict[str, Maker] = {
    "Adam": Adam,
    "AdamW": AdamW,
    "FusedAdam": FusedAdam,
    "CPUAdam": CPUAdam,
    "DeepSpeedCPUAdam": CPUAdam,
    "Adagrad": Adagrad,
    "Lamb": Lamb,
    "FusedLamb": Lamb,
    "Lion": Lion,
    "FusedLion": Lion,
    "SGD": SGD,
    "Muon": Muon,
}
_EIGHT_BIT = {"Adam8bit": False, "AdamW8bit": True}
_TORCH = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
NAMES: dict[str, str] = {name.lower(): name for name in (*_TORCH, *_CLASSES, *_EIGHT_BIT)}
"""Every name in lower case -> as it is written."""
_INSTEAD = {
    "onebitadam": "AdamW",
    "zerooneadam": "AdamW",
    "onebitlamb": "Lamb",
    "muadam": "AdamW",
    "muadamw": "AdamW",
    "musgd": "SGD",
}
"""DeepSpeed's names of optimizers that megazero has not -> the nearest one that it has."""
_NUMBERS = ("lr", "betas", "eps", "weight_decay", "momentum", "muon_lr", "adam_lr", "max_coeff", "min_coeff")
_NONE_IS_DEFAULT = ("weight_decay", "muon_lr", "adam_lr")


def make_optimizer(type: str, params: Any, arguments: Mapping[str, Any] | None = None) -> torch.optim.Optimizer:
    """The optimizer of this name over parameters, named parameters or groups.

    Args:
        type: one of `NAMES`, in any case.
        arguments: of its class, and what DeepSpeed writes beside them for Adam: torch_adam, adam_w_mode,
            bias_correction.

    Raises ConfigError for an unknown name or argument, and for values that the class refuses.
    """
    arguments = dict(arguments or {})
    folded = str(type).replace("_", "").lower()
    if folded in _INSTEAD:
        raise ConfigError(
            f"optimizer type {type!r}: it compresses communication, or needs the mup package, and megazero has not got "
            f"it. Use {_INSTEAD[folded]}; to send gradients in 16 bits: communication_data_type."
        )
    if folded not in NAMES:
        raise ConfigError(
            f"optimizer type {type!r} is unknown.{did_you_mean(str(type), NAMES.values())} There are "
            f"{', '.join(sorted(set(NAMES.values()), key=str.lower))}."
        )
    name = NAMES[folded]
    _check_common(name, arguments)
    maker, arguments = _resolved(name, arguments)
    known = sorted(set(accepted_arguments(maker)) | _understood(name))
    unknown = [
        f"optimizer {name} has no argument {given!r}.{did_you_mean(given, known)} It takes {', '.join(known)}."
        for given in arguments
        if given not in known and name not in _EIGHT_BIT  # whose package says itself what it takes
    ]
    if unknown:
        raise ConfigError(*unknown)
    try:
        return maker(params, **{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    except ConfigError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"optimizer {name} with {_shown(arguments)}: {error}") from error


def accepted_arguments(maker: Maker) -> list[str]:
    """Names of the arguments that a class takes beside its parameters, those of its bases too where it passes on."""
    names: list[str] = []
    for kind in inspect.getmro(maker) if isinstance(maker, type) else [maker]:
        parameters = list(inspect.signature(kind).parameters.values())
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name not in ("self", "params", "model_params")]


def _understood(name: str) -> set[str]:
    return {"torch_adam", "adam_w_mode", "bias_correction"} if name in ("Adam", "AdamW") else set()


def _resolved(name: str, arguments: dict[str, Any]) -> tuple[Maker, dict[str, Any]]:
    """The class for a name, and the arguments without those of DeepSpeed's that chose it."""
    if name in _EIGHT_BIT:
        return lambda params, **rest: adam_8bit(params, decoupled=_EIGHT_BIT[name], **rest), arguments
    if name not in ("Adam", "AdamW"):
        return _CLASSES.get(name) or _TORCH[name], arguments
    arguments.pop("torch_adam", None)  # it always is
    _checked(check_bias_correction, name, arguments.pop("bias_correction", True))
    decoupled = arguments.pop("adam_w_mode", name == "AdamW")
    if name == "AdamW" and not decoupled:
        raise ConfigError(
            "optimizer AdamW with adam_w_mode False: AdamW is the mode with decoupled weight decay. For weight decay "
            "added to the gradient give type Adam; else leave adam_w_mode out."
        )
    return (AdamW if decoupled else Adam), arguments


def _checked(check: Callable[[str, bool], None], name: str, value: bool) -> None:
    try:
        check(name, value)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_common(name: str, arguments: dict[str, Any]) -> None:
    if "max_grad_norm" in arguments:
        raise ConfigError(
            f"optimizer {name} with max_grad_norm {arguments['max_grad_norm']}: clipping is not the optimizer's here. "
            "Write it as gradient_clipping, beside the optimizer section."
        )
    problems = [_number_problem(name, key, arguments[key]) for key in _NUMBERS if key in arguments]
    if found := [f"optimizer {name} with {problem}" for problem in problems if problem]:
        raise ConfigError(*found)


def _number_problem(name: str, key: str, value: Any) -> str | None:
    """What is wrong with an argument that is to be a number, or two."""
    if key == "betas":
        pair = value if isinstance(value, list | tuple) else ()
        if len(pair) == 2 and all(_is_number(each) for each in pair):
            return None
        return f"betas {value!r}: two numbers are needed. Write [0.9, 0.999], or leave it out."
    if _is_number(value) or (value is None and key in _NONE_IS_DEFAULT) or (name, key) == ("Adafactor", "eps"):
        return None
    remedy = "Leave the quotes out" if isinstance(value, str) else "State one, or leave it out"
    if value == "auto":
        return f"{key} 'auto': a number is needed, and auto was not resolved. State one."
    return f"{key} {value!r}: a number is needed. {remedy}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | torch.Tensor) and not isinstance(value, bool)


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in arguments.items()) or "its defaults"
