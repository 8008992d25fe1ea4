"""Zero: a model's parameters, gradients and optimizer state over the data-parallel ranks, by stage.

    backward hook ─► grads[place] += gradient ─► bucket complete? ─► reduce-scatter (overlaps backward)
    finish_reduction ─► norm, clip, step on the shard's master ─► publish: cast, all-gather (overlaps the next forward)

The ZeRO group is the flattened (dp, cp) axes. A gradient is ready when `.grad` was filled, whoever filled it: hooks
are one entry, `gradient_ready` the explicit one. Buckets are reduced strictly in order, so that every rank issues the
same communication in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megazero.parallel.collectives import Pending, all_gather_slices, all_reduce, reduce_scatter_slices
from megazero.parallel.sharding import Box, spec_of, spec_slice_boxes, whole
from megazero.parallel.topology import Topology
from megazero.zero.buckets import Bucket, Placed, make_buckets
from megazero.zero.stages import STAGES


class Zero:
    """Owns the memory of a model's parameters. See the module's picture.

    Args:
        model: parameters may be on meta (with a `shard_spec`) or real; afterwards they are views of flat buffers.
        initial: gives the fp32 values, local shape, of a parameter that is on meta. Real ones keep theirs, which are to
            be equal on all ranks of the ZeRO group.
        units: names of the modules that no bucket crosses (blocks).
        wire_dtype: type in which gradients travel; None is fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        *,
        stage: int,
        dtype: torch.dtype,
        device: torch.device,
        initial: Callable[[Placed], Tensor],
        units: list[str],
        bucket_elements: int | None = None,
        overlap_reduce: bool = True,
        overlap_gather: bool = True,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.topology, self.group = topology, topology.group("zero")
        self.lifetimes = STAGES[stage]
        self.overlap_reduce, self.overlap_gather, self.wire_dtype = overlap_reduce, overlap_gather, wire_dtype
        _give_specs(model, topology)
        empty = _leave_meta(model, device)
        sharded = self.lifetimes.optimizer_sharded
        self.buckets = make_buckets(model, units, self.group, sharded=sharded, limit=bucket_elements)
        for bucket in self.buckets:
            bucket.allocate(
                dtype,
                device,
                lambda place: initial(place) if place.parameter in empty else place.parameter.detach().float(),
            )
        self._home: dict[nn.Parameter, tuple[int, Placed]] = {
            place.parameter: (index, place) for index, bucket in enumerate(self.buckets) for place in bucket.placed
        }
        self.local_sums: list[Tensor] = []
        """Sum of each bucket's gradients on this rank alone, in the last reduction."""
        self._gathers: dict[int, Pending] = {}
        self._reductions: list[Pending] = []
        self.expect(lambda parameter: 1)
        self.sync = True
        """False while a backward only accumulates: the boundary of gradient accumulation is a later one."""
        for parameter in self._home:
            parameter.register_post_accumulate_grad_hook(self.gradient_ready)
        if overlap_gather and sharded and self.group.size > 1:
            self._wait_before_use(model, units)

    # gradients

    def expect(self, arrivals: Callable[[nn.Parameter], int]) -> None:
        """How often a gradient comes at the boundary until it is whole: in a pipeline once a micro-batch and stage."""
        self._arrivals = {parameter: arrivals(parameter) for parameter in self._home}
        self._begin()

    def _begin(self) -> None:
        self._filled: set[nn.Parameter] = set()
        self._missing = [sum(self._arrivals[place.parameter] for place in bucket.placed) for bucket in self.buckets]
        self._next = 0  # buckets before this one are on their way
        self._reductions = []

    @torch.no_grad()
    def gradient_ready(self, parameter: nn.Parameter) -> None:
        """Move `parameter.grad` into its bucket; at the boundary, start reducing buckets that are complete."""
        assert parameter.grad is not None
        index, place = self._home[parameter]
        target = self.buckets[index].grads[place.start : place.stop].view(place.spec.local_shape)
        if parameter in self._filled:
            target.add_(parameter.grad)
        else:
            target.copy_(parameter.grad)
            self._filled.add(parameter)
        parameter.grad = None
        if self.sync:
            self._missing[index] -= 1
            if self.overlap_reduce:
                while self._next < len(self.buckets) and self._missing[self._next] <= 0:
                    self._reduce_next()

    def _reduce_next(self) -> None:
        bucket = self.buckets[self._next]
        if self._next == 0:
            self.local_sums = []
        self._next += 1
        for place in bucket.placed:
            if place.parameter not in self._filled:  # unused in this step
                bucket.grads[place.start : place.stop].zero_()
        # A sum is finite exactly when its terms are (overflow aside): tells later which rank made a bad gradient.
        self.local_sums.append(bucket.grads.sum())
        self._reductions.append(reduce_scatter_slices(bucket.grads, self.group, self.wire_dtype, bucket.padding))

    @torch.no_grad()
    def finish_reduction(self) -> None:
        """Reduce what is left and wait. Afterwards each bucket's `owned` part of `grads` is the sum over all ranks."""
        self.wait_parameters()  # what no forward has used may still be on its way, and the step will change it
        while self._next < len(self.buckets):
            self._reduce_next()
        gathers = []
        for bucket, pending in zip(self.buckets, self._reductions, strict=True):
            pending.wait()
            if bucket.grad_sum is not None:
                all_reduce(bucket.grads[bucket.slice[0] : bucket.slice[1]], bucket.grad_sum)
            if not self.lifetimes.optimizer_sharded:
                gathers.append(all_gather_slices(bucket.grads, self.group, bucket.padding))
        for pending in gathers:
            pending.wait()
        self._begin()

    # parameters

    @torch.no_grad()
    def publish(self) -> None:
        """After the step: make the updated masters the parameters of every rank."""
        for index in reversed(range(len(self.buckets))):  # the order in which forward needs them
            bucket = self.buckets[index]
            bucket.cast_master()
            if self.lifetimes.optimizer_sharded and self.group.size > 1:
                self._gathers[index] = all_gather_slices(bucket.values, self.group, bucket.padding)
        if not self.overlap_gather:
            self.wait_parameters()

    def wait_parameters(self, indices: Iterable[int] | None = None) -> None:
        """Wait until the parameters of these buckets (default: all) have arrived."""
        if not self._gathers:
            return
        for index in list(self._gathers if indices is None else indices):
            pending = self._gathers.pop(index, None)
            if pending is not None:
                pending.wait()

    def _wait_before_use(self, model: nn.Module, units: list[str]) -> None:
        # A unit may read the parameters of modules inside it without calling these, as nn.MultiheadAttention does.
        at_once = set(units or [""])
        for name, module in model.named_modules():
            if any(name.startswith(f"{unit}.") for unit in units):
                continue  # the unit has waited
            indices = {self._home[p][0] for p in module.parameters(recurse=name in at_once) if p in self._home}
            if indices:
                module.register_forward_pre_hook(partial(_wait_hook, self, sorted(indices)))

    # what the optimizer, the clip and the checkpoint see

    def segments(self, key: Callable[[Placed], object]) -> list[tuple[Bucket, object, int, int]]:
        """The owned parts of all buckets, cut where `key` changes: (bucket, key, start, stop)."""
        found: list[tuple[Bucket, object, int, int]] = []
        for bucket in self.buckets:
            first = len(found)
            for place, lo, hi in bucket.parts(*bucket.owned):
                k = key(place)
                if len(found) > first and found[-1][1] == k:
                    found[-1] = (bucket, k, found[-1][2], hi)
                else:
                    found.append((bucket, k, lo, hi))
        return found

    def norm_squared(self) -> Tensor:
        """Sum of squares of this rank's share of the reduced gradients, fp64 scalar. Summed over the world it is the
        squared global norm: the slices of a ZeRO group are disjoint, and of replicas the owner alone counts."""
        rank, norms = self.topology.rank, []
        for bucket in self.buckets:
            runs: list[list[int]] = []
            for place, lo, hi in bucket.parts(*bucket.slice):
                if not place.spec.owned_by(rank):
                    continue
                if runs and runs[-1][1] == lo:
                    runs[-1][1] = hi
                else:
                    runs.append([lo, hi])
            norms += [torch.linalg.vector_norm(bucket.grads[lo:hi]) for lo, hi in runs]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self.buckets[0].grads.device)
        return torch.stack(norms).double().square().sum()

    def scale_gradients(self, factor: Tensor | float) -> None:
        """Multiply the owned gradients."""
        for bucket in self.buckets:
            bucket.grads[bucket.owned[0] : bucket.owned[1]].mul_(factor)

    def pieces(
        self, buffers: Iterable[tuple[Bucket, int, Tensor]], *, for_save: bool, suffix: str = ""
    ) -> list[tuple[str, tuple[int, ...], Box, Tensor]]:
        """Boxes of logical tensors that flat buffers hold: (name + suffix, logical shape, box, view of that shape).

        `buffers` are (bucket, first element, flat tensor) over owned parts. For saving, every element appears on one
        rank only (this rank's slice, where it owns the box); for loading, all that this rank needs.
        """
        found = []
        for bucket, first, buffer in buffers:
            low, high = first, first + buffer.numel()
            if for_save:
                low, high = max(low, bucket.slice[0]), min(high, bucket.slice[1])
            for place, lo, hi in bucket.parts(low, high):
                if for_save and not place.spec.owned_by(self.topology.rank):
                    continue
                flat = buffer[lo - first : hi - first]
                for at, box in spec_slice_boxes(place.spec, lo - place.start, hi - place.start):
                    view = flat[at : at + box.numel].view(box.shape)
                    found.append((place.spec.name + suffix, place.spec.shape, box, view))
        return found

    def masters(self) -> list[tuple[Bucket, int, Tensor]]:
        """The fp32 masters, as `pieces` takes them."""
        return [(bucket, bucket.owned[0], bucket.master) for bucket in self.buckets]


def _wait_hook(zero: Zero, indices: list[int], module: nn.Module, args: object) -> None:
    zero.wait_parameters(indices)


def _give_specs(model: nn.Module, topology: Topology) -> None:
    """Describe the parameters of modules that know nothing of megazero: whole, and equal on all tp ranks."""
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "shard_spec"):
            spec = replace(whole(name, tuple(parameter.shape)), replicas=topology.group("tp").ranks)
            parameter.shard_spec = spec  # type: ignore[attr-defined]


def _leave_meta(model: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Give parameters that are on meta an empty tensor on `device` to be rebound, and return these; ties stay."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None or not old.is_meta:
                continue
            if old not in replaced:
                new = nn.Parameter(torch.empty(old.shape, device=device), requires_grad=old.requires_grad)
                new.shard_spec = spec_of(name, old)  # type: ignore[attr-defined]
                replaced[old] = new
            module._parameters[name] = replaced[old]
    return set(replaced.values())
