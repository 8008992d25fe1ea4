"""Building a model that is larger than one rank's memory: `with megazero.zero.Init(): model = Model(...)`.

    module.weight = Parameter(…)  ─► live, whole, newest ── more live than the budget? ─► oldest: own slice alone
    module.weight is read         ─► gathered, live again (an initialiser may write it)
    end of the block              ─► all of them slices

A parameter is cut into equal slices of its flattened values in its own type, so that the fp32 master can later be made
from what was never cast. What a rank wrote is replaced by what the group's first rank wrote: a model has one set of
initial values, whatever the ranks' random states. `initialize()` takes the slices over, bucket by bucket.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from megazero.base.device import default_backend, device_for, initialize_distributed
from megazero.base.errors import ConfigError
from megazero.base.launch import Launch
from megazero.parallel.collectives import all_gather_slices, broadcast
from megazero.parallel.topology import AxisGroup
from megazero.zero.status import is_available, mark, set_available, unmark

LIVE_ELEMENTS = 16_000_000
"""Elements that may be whole at once while a model is built, if no single parameter is larger."""


@dataclass
class Slice:
    """A parameter of which this rank holds one slice."""

    group: AxisGroup
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    own: Tensor
    """[ceil(numel / ranks)]"""

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @torch.no_grad()
    def whole(self) -> Tensor:
        """All of it [shape]. Collective."""
        flat = torch.empty(self.own.numel() * self.group.size, dtype=self.dtype, device=self.device)
        flat.chunk(self.group.size)[self.group.rank].copy_(self.own)
        with _explained():
            all_gather_slices(flat, self.group, padding=flat.numel() - self.numel).wait()
        return flat[: self.numel].view(self.shape)


@contextmanager
def _explained() -> Iterator[None]:
    """What a failed communication of this file most often means, beside its error."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            "Parameters are cut and gathered by all ranks together: under zero.Init, or while a stage 3 configuration "
            "is alive in transformers, every rank builds and loads the same models. Was this called on some ranks only "
            "(`if rank == 0: …from_pretrained(…)`)?"
        )
        raise


_SLICES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_guard: RemovableHandle | None = None
"""While there are slices, modules that have some refuse to run."""


def _refuse_to_run(module: nn.Module, args: Any) -> None:
    """A hook of all modules. A model of which no engine was made would answer NaN."""
    if torch.compiler.is_compiling() or Init._active is not None:  # torch.compile cannot look into the slices
        return
    _lift_guard()  # of models that are no more
    away = [name for name, p in module._parameters.items() if p is not None and p in _SLICES and not is_available(p)]
    if away:
        raise ConfigError(
            f"{type(module).__name__} was built under zero.Init (or while a stage 3 configuration was alive in "
            f"transformers), so that this rank has one slice of its {' and '.join(away)}, and no engine gathers them. "
            "Give the model to initialize() (with stage 3 and no optimizer for inference), build it outside zero.Init, "
            "or run it inside `with GatheredParameters(list(model.parameters())):`."
        )


def _lift_guard() -> None:
    """Let all modules run without a look at them once there are no slices."""
    global _guard
    if _guard is not None and not len(_SLICES):
        _guard.remove()
        _guard = None


def _keep(parameter: Tensor, own: Slice) -> None:
    global _guard
    _SLICES[parameter] = own
    if _guard is None:
        _guard = register_module_forward_pre_hook(_refuse_to_run)


def slice_of(parameter: Tensor) -> Slice | None:
    """What stands behind a parameter that `Init` has cut and no engine has taken over."""
    found: Slice | None = _SLICES.get(parameter)
    return found


def forget(parameter: Tensor) -> None:
    """Its values are elsewhere now."""
    if _SLICES.pop(parameter, None) is not None:
        unmark(parameter)
        for name in _COPYING:
            vars(parameter).pop(name, None)
    _lift_guard()


class _Copying:
    """What `copy.deepcopy` and pickle do with a parameter of Init's, as attributes of the parameter.

    A copy of a slice is a slice; one of a parameter that is whole while a model is built is one more that is built
    (torch.nn.TransformerEncoder is made of such copies).
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = weakref.ref(parameter)  # which holds this

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        parameter = self._parameter()
        assert parameter is not None
        made = type(parameter)(parameter.data, parameter.requires_grad)
        known = _SLICES.get(parameter)
        if known is not None and not is_available(parameter):
            _keep(made, replace(known, own=known.own.clone()))
            mark(made)
            _watch_copies(made)
            return made
        made.data = parameter.data.clone(memory_format=torch.preserve_format)
        if Init._active is not None:
            Init._active.take(made)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        parameter = self._parameter()
        assert parameter is not None
        if not is_available(parameter):
            raise ConfigError(
                f"a parameter of shape {tuple(parameter.shape)} that was built under zero.Init cannot be pickled: this "
                "rank has one slice of it. Pickle inside `with GatheredParameters(list(module.parameters())):`."
            )
        return nn.Parameter(parameter.data, parameter.requires_grad).__reduce_ex__(protocol)


_COPYING = ("__deepcopy__", "__reduce_ex__")


def _watch_copies(parameter: nn.Parameter) -> None:
    copying = _Copying(parameter)
    for name in _COPYING:
        setattr(parameter, name, getattr(copying, name))


@torch.no_grad()
def restore(parameter: nn.Parameter) -> None:
    """Make a parameter in slices whole, until it is cut again. Collective."""
    parameter.data = _SLICES[parameter].whole()
    set_available(parameter, True)


@torch.no_grad()
def cut(parameter: nn.Parameter, group: AxisGroup, home: torch.device | None = None, source: int = 0) -> None:
    """Keep this rank's slice of a whole parameter, with the values of the group's member `source`. Collective."""
    width = -(-parameter.numel() // group.size)
    flat = parameter.data.reshape(-1).contiguous()
    with _explained():
        broadcast(flat, group, source)
    own = torch.zeros(width, dtype=flat.dtype, device=home or flat.device)
    part = flat[group.rank * width : (group.rank + 1) * width]
    own[: part.numel()] = part
    _keep(parameter, Slice(group, parameter.shape, parameter.dtype, parameter.device, own))
    parameter.data = torch.full((), torch.nan, dtype=flat.dtype, device=flat.device).expand(parameter.shape)
    mark(parameter)
    _watch_copies(parameter)


class Init:
    """Context in which the parameters of new modules are cut over the data-parallel ranks as they come to be.

    Works for constructors, `from_config` and `from_pretrained` of local files: every rank runs the same code. After the
    block parameters show NaN of their shape; `GatheredParameters` shows their values. Modules that hold some refuse to
    run until the model is given to `initialize()`.

    Args:
        config_dict_or_path, config: a ds_config. With a `zero_optimization.stage` other than 3 nothing is cut.
        data_parallel_group: ranks to cut over; default: `mpu`'s data-parallel group, else all.
        remote_device: `cpu` keeps the slices in CPU memory (`nvme` too, until `initialize`).
        enabled: False makes the block do nothing.
        dtype: type of floating-point parameters; default: their own (fp32 masters come from these).
        module, mem_efficient_linear, pin_memory, param_dict, sequence_data_parallel_group: DeepSpeed's. `module`: cut
            the parameters of this module at once. The others have nothing to do here.
    """

    _active: Init | None = None

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        param_dict: Any = None,
        sequence_data_parallel_group: Any = None,
    ) -> None:
        source = config if config is not None else config_dict_or_path
        self.enabled = enabled and (source is None or _stage_of(source) == 3)
        self.dtype, self.home = dtype, torch.device("cpu") if remote_device in ("cpu", "nvme") else None
        self._group_given, self._mpu = data_parallel_group, mpu
        self._live: OrderedDict[nn.Parameter, None] = OrderedDict()
        if module is not None and self.enabled:
            group = self._find_group()
            for parameter in module.parameters():
                cut(parameter, group, self.home)

    def __enter__(self) -> Init:
        if not self.enabled or Init._active is not None:  # an outer block does it
            self._restore: Callable[[], None] | None = None
            return self
        self.group = self._find_group()
        register, read = nn.Module.register_parameter, nn.Module.__getattr__
        taking = self.take

        def register_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            register(module, name, parameter)
            if parameter is not None:
                taking(parameter)

        def getattr_(module: nn.Module, name: str) -> Any:
            value = read(module, name)
            if isinstance(value, nn.Parameter):
                taking(value)
            return value

        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign, assignment]
        nn.Module.__getattr__ = getattr_  # type: ignore[method-assign]
        Init._active = self

        def restore() -> None:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
            nn.Module.__getattr__ = read  # type: ignore[method-assign]
            Init._active = None

        self._restore = restore
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._restore is None:
            return
        self._restore()
        if kind is None:  # after an error the ranks may not be at the same place
            self._shrink(0)

    def take(self, parameter: nn.Parameter) -> None:
        """A parameter was registered, read or copied: it is whole, and the newest."""
        if parameter.is_meta or not parameter.is_floating_point():
            return
        known = _SLICES.get(parameter)
        if not is_available(parameter):
            restore(parameter)
        elif known is None and parameter not in self._live:
            _watch_copies(parameter)
            if self.dtype is not None:
                parameter.data = parameter.data.to(self.dtype)
        self._live[parameter] = None
        self._live.move_to_end(parameter)
        self._shrink(max(LIVE_ELEMENTS, parameter.numel()))

    def _shrink(self, limit: int) -> None:
        """Cut the oldest until no more than `limit` elements are whole."""
        total = sum(parameter.numel() for parameter in self._live)
        while self._live and total > limit:
            parameter, _ = self._live.popitem(last=False)
            total -= parameter.numel()
            if is_available(parameter):  # not cut by a GatheredParameters meanwhile
                cut(parameter, self.group, self.home)

    def _find_group(self) -> AxisGroup:
        launch = Launch.from_environment()
        if launch.world_size > 1 and not dist.is_initialized():
            device = device_for(launch.local_rank, launch.local_world_size)
            initialize_distributed(launch, default_backend(device.type), 10.0)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return AxisGroup("zero", (0,), 0, None)
        handle = self._group_given
        if handle is None and self._mpu is not None:
            handle = self._mpu.get_data_parallel_group()
        handle = handle or dist.group.WORLD
        ranks = tuple(dist.get_process_group_ranks(handle))
        return AxisGroup("zero", ranks, ranks.index(dist.get_rank()), handle)


def _stage_of(source: Any) -> int | None:
    from megazero.config.deepspeed import read_deepspeed

    setting = read_deepspeed(source).settings.get("parallel.zero_stage")
    return 0 if setting is None else int(setting.value)
