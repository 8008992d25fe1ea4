"""Flat buffers over whole parameters.

A bucket holds parameters of one unit (a block, or what is outside the blocks) in reverse registration order, which is
about the order in which backward fills their gradients. It is padded to equal slices, and rank i of its group (the
ZeRO group; for spread experts the ranks with copies of them) owns slice i of EVERY bucket, so memory and reduction time
are even by construction and a reduce-scatter writes straight into the shard.

      values  [ w3 | w2 | w1 |pad]   model dtype; the parameters are views of it. Stage 3: only while in use
      shard   [slice i]              model dtype; a view of values, or (stage 3) what is kept between uses
      grads   [ g3 | g2 | g1 |pad]   gradients accumulate here. Stages 2, 3: only until they are reduced
      reduced [slice i]              the sum over ranks; a view of grads, or (stages 2, 3) memory of its own
      master  [slice i]              fp32; for an fp32 model it is values or shard itself
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.parallel.sharding import ShardSpec, spec_of
from megazero.parallel.topology import AxisGroup
from megazero.zero.homes import FileTensor, Place, Transfer, pinned
from megazero.zero.nvme import NvmeStore
from megazero.zero.status import mark, set_available, unmark

# Slices start at multiples of this many elements, so that vectorised kernels and wires see aligned data.
ALIGNMENT = 64
DEFAULT_BUCKET_ELEMENTS = 40_000_000


@dataclass(frozen=True)
class Placed:
    """One parameter's place in a bucket: elements [start, stop) of it."""

    name: str
    parameter: nn.Parameter
    spec: ShardSpec
    start: int
    stop: int

    def overlap(self, start: int, stop: int) -> tuple[int, int] | None:
        """The part of [start, stop) that is this parameter, or None."""
        lo, hi = max(self.start, start), min(self.stop, stop)
        return (lo, hi) if lo < hi else None

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's view, local shape, of a buffer over the whole bucket."""
        return flat[self.start : self.stop].view(self.spec.local_shape)


class Bucket:
    """One flat buffer, its gradients, and the part of it whose optimizer state lives here."""

    def __init__(
        self,
        members: list[tuple[str, nn.Parameter]],
        group: AxisGroup,
        *,
        sharded: bool,
        unit: str = "",
        trainable: bool = True,
    ) -> None:
        self.group, self.unit = group, unit
        self.placed: list[Placed] = []
        at = 0
        for name, parameter in members:
            if trainable and parameter.is_complex():
                raise ConfigError(
                    f"{name} is {parameter.dtype}, and flat buckets hold real numbers. Keep torch.view_as_real(…) of "
                    "it as the parameter, and use torch.view_as_complex(…) of that in forward."
                )
            self.placed.append(Placed(name, parameter, spec_of(name, parameter), at, at + parameter.numel()))
            at += parameter.numel()
        quantum = group.size * ALIGNMENT
        self.numel = at
        self.length = -(-at // quantum) * quantum
        self.padding = self.length - self.numel
        self.width = self.length // group.size
        self.slice = (group.rank * self.width, (group.rank + 1) * self.width)
        """This rank's slice: it reduces, measures and saves this part."""
        self.owned = self.slice if sharded else (0, self.length)
        """The part whose master and optimizer state live here."""
        self.grad_sum = self.placed[0].spec.grad_sum
        self.trainable = trainable

    def allocate(
        self,
        dtype: torch.dtype,
        device: torch.device,
        initial: Callable[[Placed], Tensor],
        *,
        grad_dtype: torch.dtype = torch.float32,
        shard_gradients: bool = False,
        shard_parameters: bool = False,
        place: Place | None = None,
    ) -> None:
        """Make the buffers, fill values and master from `initial` (fp32, local shape) before any cast, and bind the
        parameters to them.

        Args:
            shard_gradients: keep only this rank's slice of them (stages 2 and 3).
            shard_parameters: keep only this rank's slice of them (stage 3).
            place: homes of what is kept; default `device`.
        """
        self.dtype, self.device, self.grad_dtype = dtype, device, grad_dtype
        self.place = place or Place(device, device)
        self.parameters_sharded, self.gradients_sharded = shard_parameters, shard_gradients
        start, stop = self.owned
        values = torch.zeros(self.length, dtype=dtype, device=device)
        weights_at = self.place.shard_device if shard_parameters else device
        apart = dtype != torch.float32 or self.place.state_device != weights_at
        master = torch.zeros(stop - start, device=self.place.state_device) if self.trainable and apart else None
        for member in self.placed:
            uncast = initial(member).reshape(-1)
            values[member.start : member.stop].copy_(uncast)
            if master is not None and (part := member.overlap(start, stop)) is not None:
                lo, hi = part
                master[lo - start : hi - start].copy_(uncast[lo - member.start : hi - member.start])
            del uncast
            if shard_parameters:
                member.parameter.data = stand_in(member, dtype, device)
                mark(member.parameter)
            else:
                unmark(member.parameter)
        self.master_file = self._to_file("master", master, self.place.state_store)
        self._master = None if master is None or self.master_file else pinned(master, device)
        self._keep_values(values)
        self.grads: Tensor | None = None
        """Whole, while they are being filled (stages 0 and 1: always)."""
        self._reduced: Tensor | None = None
        if not self.trainable:
            return
        if shard_gradients:
            self._reduced = torch.zeros(self.width, dtype=grad_dtype, device=self.place.state_device)
        else:
            self.grads = torch.zeros(self.length, dtype=grad_dtype, device=device)

    def _keep_values(self, values: Tensor) -> None:
        """Bind the parameters, or (stage 3) keep this rank's slice at its home."""
        own = values[self.slice[0] : self.slice[1]]
        self.values: Tensor | None = None
        self.shard_file: FileTensor | None = None
        self._shard: Tensor | None = None
        if not self.parameters_sharded:
            self.values = values
            self.bind(values)
            return
        self.shard_file = self._to_file("shard", own.cpu(), self.place.shard_store)
        if self.shard_file is None:
            self._shard = pinned(torch.empty_like(own, device=self.place.shard_device).copy_(own), self.device)

    def _to_file(self, kind: str, tensor: Tensor | None, store: NvmeStore | None) -> FileTensor | None:
        if tensor is None or store is None:
            return None
        file = FileTensor(store, f"{self.placed[0].name}.{kind}", tensor.numel(), tensor.dtype)
        file.write(tensor.contiguous()).wait()
        return file

    @property
    def shard(self) -> Tensor:
        """This rank's slice in the model's type."""
        if self.values is not None and not self.parameters_sharded:
            return self.values[self.slice[0] : self.slice[1]]
        if self._shard is not None:
            return self._shard
        assert self.shard_file is not None
        return self.shard_file.mapped()

    def fetch_shard(self, out: Tensor) -> Transfer | None:
        """Start copying the shard into `out` (stage 3). None: it is there, as far as later work on the device sees."""
        if self.shard_file is not None and out.is_cpu:
            return self.shard_file.read(out)
        out.copy_(self.shard, non_blocking=True)
        return None

    @property
    def master(self) -> Tensor:
        """fp32 [owned]. For an fp32 model the weights themselves. A file is mapped into memory."""
        if self._master is not None:
            return self._master
        if self.master_file is not None:
            return self.master_file.mapped()
        if self.parameters_sharded:
            return self.shard
        assert self.values is not None
        return self.values[self.owned[0] : self.owned[1]]

    @master.setter
    def master(self, tensor: Tensor) -> None:  # `bucket.master += x`
        assert tensor.data_ptr() == self.master.data_ptr(), "a master keeps its memory"

    @property
    def master_shard_file(self) -> FileTensor | None:
        """The file of an fp32 shard that is its own master."""
        return self.shard_file if self._master is None and self.master_file is None else None

    @property
    def master_in_memory(self) -> bool:
        return self.master_file is None and self.master_shard_file is None

    @property
    def reduced(self) -> Tensor:
        """The reduced gradients of the owned part, after `Zero.finish_reduction`."""
        if self._reduced is not None:
            return self._reduced
        assert self.grads is not None
        return self.grads[self.owned[0] : self.owned[1]]

    def bind(self, values: Tensor) -> None:
        """Make the parameters views of `values`."""
        for place in self.placed:
            place.parameter.data = place.of(values)
            if self.parameters_sharded:
                set_available(place.parameter, True)

    def unbind(self) -> None:
        """Let go of the whole values (stage 3)."""
        self.values = None
        for place in self.placed:
            place.parameter.data = stand_in(place, self.dtype, self.device)
            set_available(place.parameter, False)

    def check_memory(self) -> None:
        """Raise ConfigError for a parameter that is no longer in its place here: no step would reach it."""
        size = self.dtype.itemsize
        base = None if self.values is None else self.values.data_ptr()
        for place in self.placed:
            if base is None:
                moved = place.parameter.untyped_storage().nbytes() > size
            else:
                moved = place.parameter.data_ptr() != base + place.start * size
            if moved and place.start < place.stop:
                raise ConfigError(
                    f"{place.name} has been given other memory since initialize() (p.data = …, module.to(), .half()), "
                    "which no step would reach. Change values in place, inside GatheredParameters with "
                    "modifier_rank=0; cast and move the module before initialize()."
                )

    def cast_master(self, master: Tensor | None = None) -> None:
        """Write the updated masters (default: this bucket's own, if they are apart from the weights) into the model's
        own type."""
        if master is None:
            if self._master is None and self.master_file is None:
                return
            master = self.master
        if not self.parameters_sharded:
            assert self.values is not None
            self.values[self.owned[0] : self.owned[1]].copy_(master, non_blocking=True)
        elif self.shard_file is not None:
            self.shard_file.write(master.to(self.dtype)).wait()
        else:
            assert self._shard is not None
            self._shard.copy_(master, non_blocking=True)

    def has_uncast_masters(self) -> bool:
        """Whether the masters hold what a cast to the model's type has taken from the values."""
        return self.trainable and self.dtype != torch.float32

    def free_gradients(self) -> None:
        """Let go of their memory. The bucket takes no more of them."""
        self.grads = self._reduced = None

    def free(self) -> None:
        """Let go of all memory. The bucket is of no more use."""
        self.free_gradients()
        self.values = self._shard = self._master = None

    def parts(self, start: int, stop: int) -> Iterable[tuple[Placed, int, int]]:
        """The parameters within elements [start, stop), each with its overlap."""
        for place in self.placed:
            if (part := place.overlap(start, stop)) is not None:
                yield place, *part

    def component_bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps for the bucket, by component, without optimizer states."""
        weights = self.width if self.parameters_sharded else self.length
        found = {"weights": 0 if self.shard_file is not None else weights * self.dtype.itemsize}
        if self.trainable:
            kept = self.width if self.gradients_sharded else self.length
            found["gradients"] = kept * self.grad_dtype.itemsize
            found["master weights"] = 0 if self._master is None else self._master.nbytes
        return found


def stand_in(place: Placed, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a parameter shows while its values are sharded: its shape, NaN everywhere, no memory, not writable."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(place.spec.local_shape)


def make_buckets(
    model: nn.Module,
    units: list[str],
    group: AxisGroup,
    *,
    sharded: bool,
    limit: int | None,
    wanted: Callable[[nn.Parameter], object] = lambda parameter: parameter.requires_grad or None,
    trained: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> list[Bucket]:
    """Lay out the parameters of `model` in reverse registration order.

    Args:
        units: names of the modules that no bucket crosses.
        group: the ranks that hold copies of a parameter whose spec does not say which.
        limit: largest number of elements in a bucket, unless one parameter is larger; 40 million by default. Smaller
            models get one bucket a unit, of the unit's size.
        wanted: None for a parameter to be left out; parameters of different answers never share a bucket. Default:
            those that need a gradient.
        trained: whether a parameter that needs a gradient is the optimizer's.
    """
    limit = limit or DEFAULT_BUCKET_ELEMENTS
    lists: list[tuple[str, list[tuple[str, nn.Parameter]]]] = []
    open_lists: dict[tuple[object, ...], tuple[list[tuple[str, nn.Parameter]], int]] = {}
    for name, parameter in reversed(list(model.named_parameters())):
        kind = wanted(parameter)
        if kind is None:
            continue
        spec = spec_of(name, parameter)
        summed, copies = spec.grad_sum, spec.copies
        unit = innermost(name, units)
        key = (unit, summed.ranks if summed else None, copies.ranks if copies else None, kind)
        members, size = open_lists.get(key, ([], limit))
        if size + parameter.numel() > limit:  # start a new bucket
            members, size = [], 0
            lists.append((unit, members))
        members.append((name, parameter))
        open_lists[key] = (members, size + parameter.numel())
    buckets = []
    for unit, members in lists:
        first = members[0][1]
        trainable = first.requires_grad and trained(first)
        over = spec_of(*members[0]).copies or group
        buckets.append(Bucket(members, over, sharded=sharded, unit=unit, trainable=trainable))
    return buckets


def innermost(name: str, units: Iterable[str]) -> str:
    """The innermost unit that holds the parameter or module; "" for what is outside all units."""
    return max((unit for unit in units if name.startswith(f"{unit}.")), key=len, default="")
