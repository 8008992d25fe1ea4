"""Names of DeepSpeed that are no part of megazero's own interface: small things that scripts, transformers and
accelerate import."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import megazero
from megazero.base.device import device_type, memory_bytes
from megazero.base.errors import ConfigError
from megazero.engine.units import units_of
from megazero.integrations import deepspeed_checkpointing, deepspeed_groups
from megazero.integrations.deepspeed_comm import get_rank, init_distributed
from megazero.integrations.deepspeed_trainer import mend_trainer
from megazero.zero import context

DEEPSPEED_ENVIRONMENT_NAME = ".megazero_env"
"""The file of NAME=value lines that `megazero launch` gives to all machines."""
VALID_LR_SCHEDULES = ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]


def _logger() -> logging.Logger:
    made = logging.getLogger("megazero.deepspeed")
    if not made.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
        made.addHandler(handler)
        made.setLevel(logging.INFO)
        made.propagate = False
    return made


logger = _logger()


def log_dist(message: str, ranks: Iterable[int] | None = None, level: int = logging.INFO) -> None:
    """Log on these ranks; None or -1 among them: on all."""
    chosen = set(ranks or [-1])
    if -1 in chosen or get_rank() in chosen:
        logger.log(level, f"[rank {get_rank()}] {message}")


def initialize(args: Any = None, **given: Any) -> Any:
    """`megazero.initialize`, in a process group even if that has one member, as transformers and accelerate expect of
    DeepSpeed; from then on `checkpointing.checkpoint` does as the section activation_checkpointing of
    the configuration says, unless the script has configured it itself, and `deepspeed.utils.groups` answers for
    this engine. transformers' Trainer may train again after it, and save (deepspeed_trainer.py)."""
    mend_trainer()
    init_distributed(dist_init_required=given.get("dist_init_required"))
    result = megazero.initialize(args, **given)
    deepspeed_groups.remember(result[0])
    config = next((each for each in (given.get("config"), given.get("config_params")) if each is not None), None)
    config = getattr(args, "deepspeed_config", None) if config is None else config
    if config is not None and not deepspeed_checkpointing.is_configured():
        mpu = given.get("mpu")
        deepspeed_checkpointing.apply(
            deepspeed_checkpointing.section_of(config), result[0].topology if mpu is None else mpu
        )
    return result


class OnDevice:
    """Inside the block tensors are made on this device (`meta`: without memory) and, where nothing says which type
    they have, in this floating-point type.

    Raises ConfigError for a type that is none.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "meta", enabled: bool = True) -> None:
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(
                f"OnDevice(dtype={dtype!r}): weights are made in a floating-point type. Give torch.bfloat16, "
                "torch.float16 or torch.float32."
            )
        self.dtype, self.device, self.enabled = dtype, torch.device(device), enabled

    def __enter__(self) -> OnDevice:
        if self.enabled:
            self._before = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            self.device.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.enabled:
            self.device.__exit__(*error)
            torch.set_default_dtype(self._before)


class Init(context.Init):
    """`megazero.zero.Init`, in a process group even if that has one member: transformers asks it for its rank."""

    def __init__(self, *args: Any, **given: Any) -> None:
        init_distributed()
        super().__init__(*args, **given)


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Callable[..., Tensor]:
    """`fn` itself: megazero's zero.Init changes no constructor."""
    return fn


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """A copy of nested lists, tuples and dicts whose tensors have memory of their own, so that torch.save writes no
    more than they show. Equal views, as of tied weights, share one copy: savers write such a weight once."""
    return _cloned(item, device, {})


def _cloned(item: Any, device: torch.device | str, known: dict[object, Tensor]) -> Any:
    if isinstance(item, Tensor):
        place = (item.device, item.data_ptr() or id(item), item.dtype, item.shape, item.stride())
        if place not in known:
            known[place] = item.detach().to(device, copy=True)
        return known[place]
    if isinstance(item, list | tuple):
        return type(item)(_cloned(value, device, known) for value in item)
    if isinstance(item, Mapping):
        return type(item)({key: _cloned(value, device, known) for key, value in item.items()})  # type: ignore[call-arg]
    return item


def move_to_device(item: Any, device: torch.device | str, criterion_func: Callable[[Any], bool] | None = None) -> Any:
    """Nested lists, tuples and dicts with what has `.to` on the device (of that, what the criterion accepts)."""
    if criterion_func(item) if criterion_func else hasattr(item, "to"):
        return item.to(device)
    if isinstance(item, list | tuple):
        return type(item)(move_to_device(value, device, criterion_func) for value in item)
    if isinstance(item, Mapping):
        return {key: move_to_device(value, device, criterion_func) for key, value in item.items()}
    return item


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log how much memory this process has on its device, on rank 0. As in DeepSpeed, only when forced."""
    if force and get_rank() == 0:
        logger.info(f"{message} | memory {memory_bytes(torch.device(device_type())) / 2**30:.2f} GiB")


class RepeatingLoader:
    """A loader that starts again when it ends."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader, self._batches = loader, iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            self._batches = iter(self.loader)
            return next(self._batches)


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: list[type[nn.Module] | str]) -> list[nn.Module]:
    """Make stage 3 gather modules of these classes as a whole: those that choose among their submodules by the data,
    so that ranks would gather different ones. Call it before `initialize`. Gives the modules.

    Raises ValueError when there are none.
    """
    names = {each if isinstance(each, str) else each.__name__ for each in leaf_module_classes}
    found = {name: part for name, part in model.named_modules() if type(part).__name__ in names}
    if not found:
        classes = ", ".join(sorted({type(part).__name__ for part in model.modules()}))
        raise ValueError(
            f"set_z3_leaf_modules: no module of the model is of class {', '.join(sorted(names))}. It has {classes}."
        )
    units = units_of(model)
    if not all(any(name == unit or name.startswith(f"{unit}.") for unit in units) for name in found):
        whole = {type(part).__name__ for part in found.values()}
        named: Any = getattr(model, "_no_split_modules", None) or ()
        model._no_split_modules = sorted({*named, *whole})  # type: ignore[assignment]
    return list(found.values())
