"""Stage 3: parameters are whole only while they are in use.

    unit's forward begins ─► gather its buckets (the next unit's are on their way) ─► ends ─► let go
    backward needs a saved weight ─► gather ─► all its gradients have come, or another unit's turn ─► let go

What autograd saves of a parameter is saved as its place in a bucket, not as memory (`pack`), so backward finds it
wherever and whenever it is used: in a module called twice, tied, in a custom function's saved tensors, under
checkpointing. A parameter that is read by other code than its unit's forward is gathered when it is read, and stays
until the outermost forward ends. All ranks must run their modules in the same order, as in any sharded training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from megazero.base.errors import ConfigError
from megazero.parallel.collectives import Pending, all_gather_slices
from megazero.zero.buckets import Bucket
from megazero.zero.homes import Transfer
from megazero.zero.hooks import Hook


@dataclass(frozen=True)
class Limits:
    """How much stage 3 keeps and fetches ahead, in elements."""

    prefetch: int | None = None
    """Gather the following units ahead of their use while they have no more elements than this together; None: the
    next one, whatever its size."""
    live: int = 1_000_000_000
    """Fetch nothing ahead while more than this is whole."""
    reuse: int = 0
    """Units whose backward comes within so many elements of their forward stay whole in between."""


@dataclass(frozen=True)
class Packed:
    """A view of a bucket's whole values, without the memory."""

    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Chain:
    """What came after what, the last time: tells what to fetch ahead."""

    def __init__(self) -> None:
        self._last: str | None = None
        self._following: dict[str, str] = {}

    def visit(self, unit: str) -> None:
        if self._last is not None and self._last != unit:
            self._following[self._last] = unit
        self._last = unit

    def end(self) -> None:
        self._last = None

    def after(self, unit: str) -> Iterable[str]:
        """The units that will probably follow, nearest first."""
        seen = {unit}
        while (unit := self._following.get(unit, unit)) not in seen:
            seen.add(unit)
            yield unit


class Gatherer:
    """Gathers and lets go of the sharded `buckets` around the modules of `model`."""

    def __init__(self, model: nn.Module, buckets: list[Bucket], units: list[str], limits: Limits) -> None:
        self.buckets, self.limits = buckets, limits
        self.of: dict[nn.Parameter, int] = {
            place.parameter: index for index, bucket in enumerate(buckets) for place in bucket.placed
        }
        self.units: dict[str, list[int]] = {}
        for index, bucket in enumerate(buckets):
            self.units.setdefault(bucket.unit, []).append(index)
        self._live: dict[int, None] = {}
        self._by_pointer: dict[int, int] = {}
        self._reading: dict[int, tuple[Tensor, Transfer | None]] = {}
        self._coming: dict[int, tuple[Tensor, Pending]] = {}
        self._held: set[int] = set()
        """Live until the outermost forward ends, or the block that holds them does."""
        self._pinned: dict[int, int] = {}
        """How many blocks (`GatheredParameters`) and running forwards need a bucket."""
        self._depth = 0
        self._forward, self._backward = Chain(), Chain()
        self._hooks: list[saved_tensors_hooks | None] = []
        self._hooked: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = []
        self._register(model, units)

    def _register(self, model: nn.Module, units: list[str]) -> None:
        roots = _roots(model)
        for name, module in model.named_modules(remove_duplicate=False):
            if module in self._hooked:
                continue
            unit = name if name in units else ""
            whole = bool(unit) or module in roots  # else what it holds in no unit: it may be called by itself
            inside = {self.of[p] for p in module.parameters(recurse=whole) if p in self.of}
            others = [other for other in units if not unit or other.startswith(f"{unit}.")]  # gather by themselves
            indices = sorted(index for index in inside if self.buckets[index].unit not in others)
            if whole or indices:
                self._hook(module, unit, indices)

    def _hook(self, module: nn.Module, unit: str, indices: list[int]) -> None:
        self._hooked.add(module)
        self._handles += [
            module.register_forward_pre_hook(Hook(_before, self, unit, indices), prepend=True),
            module.register_forward_hook(Hook(_after, self, indices), always_call=True),
        ]

    def also_root(self, module: nn.Module) -> None:
        """Let the forward of this module, which is called instead of the model's own (a pipeline's stage), gather what
        is in no unit."""
        if module not in self._hooked:
            self._hook(module, "", sorted(self.units.get("", [])))

    # what a unit's forward does

    def enter(self, unit: str, indices: list[int]) -> None:
        if self._depth == 0 and not in_backward():
            self._backward.end()  # of an earlier micro-batch, in a pipeline
        self._depth += 1
        self._hooks.append(self._push())
        self.hold(indices)
        if unit and not in_backward():
            self._forward.visit(unit)
            self._fetch_ahead(self._forward.after(unit))

    def leave(self, indices: list[int], output: object) -> None:
        hooks = self._hooks.pop()
        if hooks is not None:
            hooks.__exit__()
        self._depth -= 1
        for index in indices:
            self._unpin(index)
        if in_backward():  # recomputed for its backward, which comes now
            return
        keep = self._kept() if torch.is_grad_enabled() else set()
        self._held.update(
            self.of[p] for p in pytree.tree_leaves(output) if isinstance(p, nn.Parameter) and p in self.of
        )
        for index in indices:
            if index not in keep and index not in self._held:
                self.let_go(index)
        if self._depth == 0:
            self._forward.end()
            for index in [*self._held, *self._coming, *self._reading]:
                if index not in keep:
                    self.let_go(index)
            self._held.clear()

    def _push(self) -> saved_tensors_hooks | None:
        """Make autograd save places instead of memory, unless someone else (a checkpoint, which keeps nothing, or an
        offloader, which keeps copies) decides what is saved."""
        if in_backward() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return None
        hooks = saved_tensors_hooks(self.pack, self.unpack)
        hooks.__enter__()
        return hooks

    def _unpin(self, index: int) -> None:
        self._pinned[index] -= 1
        if not self._pinned[index]:
            del self._pinned[index]

    def _kept(self) -> set[int]:
        """Buckets that stay whole between forward and backward: the last units, within `limits.reuse`."""
        if not self.limits.reuse:
            return set()
        kept: set[int] = set()
        elements = 0
        for unit in self.units:  # the last units come first, as buckets are in reverse order
            elements += 2 * sum(self.buckets[index].numel for index in self.units[unit])
            if elements > min(self.limits.reuse, 2 * self.limits.live):
                break
            kept.update(self.units[unit])
        return kept

    # what backward does

    def pack(self, tensor: Tensor) -> Tensor | Packed:
        """What autograd keeps of a tensor that it saves."""
        if not self._by_pointer:
            return tensor
        index = self._by_pointer.get(tensor.untyped_storage().data_ptr())
        if index is None or tensor.dtype != self.buckets[index].dtype:
            return tensor
        return Packed(index, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, saved: Tensor | Packed) -> Tensor:
        """The saved tensor, gathered if need be."""
        if isinstance(saved, Tensor):
            return saved
        self.need_in_backward(saved.index)
        values = self.buckets[saved.index].values
        assert values is not None
        return values.as_strided(saved.size, saved.stride, saved.offset)

    def need_in_backward(self, index: int) -> None:
        unit = self.buckets[index].unit
        if index in self._live:
            return
        if unit:  # another unit's turn: let go of the one before, whose gradients may never be complete
            for other in list(self._live):
                if self.buckets[other].unit not in ("", unit):
                    self.let_go(other)
        self.need([index])
        if unit:
            self._backward.visit(unit)
            self._fetch_ahead(self._backward.after(unit))

    def end_backward(self) -> None:
        """Let go of everything that nobody holds."""
        self._backward.end()
        if self._depth == 0:
            for index in [*self._live, *self._coming, *self._reading]:
                self.let_go(index)

    # gathering

    def need(self, indices: Iterable[int]) -> None:
        """Make these buckets whole. Collective over their group."""
        indices = [index for index in indices if index not in self._live]
        for index in indices:
            self._start(index)
        self._launch()
        for index in indices:
            values, pending = self._coming.pop(index)
            pending.wait()
            bucket = self.buckets[index]
            bucket.values = values
            bucket.bind(values)
            self._live[index] = None
            self._by_pointer[values.untyped_storage().data_ptr()] = index

    def on_access(self, parameter: nn.Parameter) -> None:
        """A module's parameter is read."""
        index = self.of.get(parameter)
        if index is None or index in self._pinned:
            return
        if in_backward():
            self.need_in_backward(index)
        elif self._depth:
            self.need([index])
            self._held.add(index)

    def _start(self, index: int) -> None:
        """Begin with this rank's own slice."""
        if index in self._coming or index in self._reading:
            return
        bucket = self.buckets[index]
        values = torch.empty(bucket.length, dtype=bucket.dtype, device=bucket.device)
        self._reading[index] = (values, bucket.fetch_shard(values[bucket.slice[0] : bucket.slice[1]]))

    def _launch(self) -> None:
        """Start the gathers of all slices that were asked for, in that order on every rank."""
        for index, (values, transfer) in list(self._reading.items()):
            if transfer is not None:
                transfer.wait()
            del self._reading[index]
            bucket = self.buckets[index]
            self._coming[index] = (values, all_gather_slices(values, bucket.group, bucket.padding))

    def _fetch_ahead(self, following: Iterable[str]) -> None:
        ahead, prefetch = 0, self.limits.prefetch
        whole = sum(self.buckets[index].numel for index in [*self._live, *self._coming])
        for unit in following:
            for index in self.units.get(unit, ()):
                ahead += self.buckets[index].numel
                if (prefetch is not None and ahead > prefetch) or whole + ahead > self.limits.live:
                    break
                if index not in self._live:
                    self._start(index)
            else:
                if prefetch is not None:
                    continue
            break
        if all(transfer is None for _, transfer in self._reading.values()):
            self._launch()

    def let_go(self, index: int) -> None:
        """Free a bucket's whole values, unless something holds them."""
        if index in self._pinned:
            return
        if index in self._reading:
            self._launch()
        if index in self._coming:
            self._coming.pop(index)[1].wait()
        if index in self._live:
            bucket = self.buckets[index]
            assert bucket.values is not None
            del self._live[index], self._by_pointer[bucket.values.untyped_storage().data_ptr()]
            bucket.unbind()

    def hold(self, indices: Iterable[int]) -> None:
        """Make these whole until `unhold`."""
        for index in indices:
            self._pinned[index] = self._pinned.get(index, 0) + 1
        self.need(indices)

    def unhold(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._unpin(index)
            if not self._depth:
                self.let_go(index)

    def take_off(self) -> None:
        """Take the hooks off the modules."""
        for handle in self._handles:
            handle.remove()

    def is_pinned(self) -> bool:
        """Whether a block (`GatheredParameters`) or a running forward holds parameters."""
        return bool(self._pinned or self._depth)

    def refuse_copy(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raises ConfigError when one of these is not whole, so that its copy would have no values."""
        away = [tuple(p.shape) for p in parameters if p in self.of and self.of[p] not in self._live]
        if away:
            raise ConfigError(
                f"a module whose parameters (one of shape {away[0]}) are spread over ranks, or in CPU memory or files, "
                "by ZeRO stage 3 cannot be copied or pickled: this rank has not got their values. Copy it inside "
                "`with GatheredParameters(list(module.parameters())):`, or load engine.consolidated_state_dict() into "
                "a fresh model."
            )


def _roots(model: nn.Module) -> list[nn.Module]:
    """The modules that are called from outside: the parts of a list, which itself is not."""
    if not isinstance(model, nn.ModuleList | nn.ModuleDict):
        return [model]
    return [root for child in model.children() for root in _roots(child)]


class OnAccess(dict[str, nn.Parameter | None]):
    """A module's `_parameters`, which tells of each that is read through an attribute, and of each that is listed
    (`parameters()`, `state_dict()`)."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter | None],
        before: Callable[[nn.Parameter], None],
        listed: Callable[[nn.Parameter], None],
        before_copy: Callable[[Iterable[nn.Parameter]], None],
    ) -> None:
        super().__init__(parameters)
        self._before, self._listed, self._before_copy = before, listed, before_copy

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._before(parameter)
        return parameter

    def items(self) -> Any:
        for parameter in super().values():
            if parameter is not None:
                self._listed(parameter)
        return super().items()

    def __reduce__(self) -> Any:  # a copied or pickled module is an ordinary one
        plain = self.plain()
        self._before_copy(p for p in plain.values() if p is not None)
        return dict, (plain,)

    def plain(self) -> dict[str, nn.Parameter | None]:
        """The same as an ordinary dictionary."""
        return dict(dict.items(self))


def stop_watching(module: nn.Module) -> None:
    """Give a module an ordinary `_parameters` again."""
    if isinstance(module._parameters, OnAccess):
        module._parameters = module._parameters.plain()


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)  # the same question that torch.utils.checkpoint asks


def _before(gatherer: Gatherer, unit: str, indices: list[int], module: nn.Module, args: object) -> None:
    gatherer.enter(unit, indices)


def _after(gatherer: Gatherer, indices: list[int], module: nn.Module, args: object, output: object) -> None:
    gatherer.leave(indices, output)
