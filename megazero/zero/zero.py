"""Zero: a model's parameters, gradients and optimizer state over the data-parallel ranks, by stage.

    backward ─► Reduction: into buckets, reduce-scatter (overlaps backward) ─► finish_reduction
    norm, clip, step on the shard's master ─► publish: cast, all-gather (overlaps the next forward)
    stage 3 ─► Gatherer: whole parameters around each use

The ZeRO group is the flattened (dp, cp) axes; experts that are spread over ranks have the group of their copies. A
gradient is ready when `.grad` was filled, whoever filled it: hooks are one entry, `gradient_ready` the explicit one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megazero.parallel.collectives import Pending, all_gather_slices
from megazero.parallel.sharding import Box, spec_of, spec_slice_boxes
from megazero.parallel.topology import AxisGroup, Topology
from megazero.zero.adopt import drop_gradients, give_specs, leave_meta, settle_others, values_of, with_leaves
from megazero.zero.buckets import Bucket, Placed, innermost, make_buckets
from megazero.zero.gather import Gatherer, Limits
from megazero.zero.homes import Homes
from megazero.zero.hooks import Hook
from megazero.zero.reads import OnAccess, stop_watching
from megazero.zero.reduction import Reduction
from megazero.zero.stages import STAGES
from megazero.zero.status import describe


class Zero:
    """Owns the memory of a model's parameters. See the module's picture.

    Args:
        model: parameters may be on meta (with a `shard_spec`) or real; afterwards they are views of flat buffers.
        initial: gives the fp32 values, local shape, of a parameter that is on meta. Real ones keep theirs, which are to
            be equal on all ranks of the ZeRO group.
        units: names of the modules that no bucket crosses and that stage 3 gathers as one (blocks).
        trained: whether a parameter that needs a gradient is the optimizer's; the gradients of others are dropped.
        homes: where what is kept lives; default: on the device.
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
        grad_dtype: torch.dtype = torch.float32,
        limits: Limits | None = None,
        persistence_threshold: int = 0,
        trained: Callable[[nn.Parameter], bool] = lambda parameter: True,
        homes: Homes | None = None,
    ) -> None:
        self.model, self.topology, self.group = model, topology, topology.group("zero")
        self.stage, self.lifetimes, self.dtype, self.device = stage, STAGES[stage], dtype, device
        self.overlap_gather = overlap_gather
        self.homes = homes or Homes(device)
        alone = self.group.size == 1
        self._shards_parameters = self.lifetimes.parameters_sharded and not (alone and self.homes.param == "none")
        self._shards_gradients = self.lifetimes.gradients_sharded and not (
            alone and (self.homes.optimizer == "none" or device.type == "cpu")
        )
        give_specs(model, topology)
        empty = leave_meta(model, device)
        units = with_leaves(model, units, self.group.size)
        buckets = self._lay_out(model, units, bucket_elements, persistence_threshold, trained)
        source = partial(values_of, initial, empty)
        for bucket in buckets:
            bucket.allocate(
                dtype,
                device,
                source,
                grad_dtype=grad_dtype,
                shard_gradients=self._shards_gradients,
                shard_parameters=self._shards_parameters and not self._stays_whole(bucket),
                place=self.homes.place(bucket.length if bucket.trainable else 0, bucket.width),
            )
        self._undo: list[Callable[[], None]] = []
        placed = {place.parameter for bucket in buckets for place in bucket.placed}
        self.dropped = settle_others(model, placed, dtype, device)
        self.buckets = [bucket for bucket in buckets if bucket.trainable]
        """Of parameters that are trained, in about the order in which backward fills them."""
        self.frozen = [bucket for bucket in buckets if not bucket.trainable]
        """Stage 3: of parameters that are not trained."""
        self.reduction = Reduction(
            self.buckets,
            sharded=self._shards_gradients,
            gather=not self.lifetimes.optimizer_sharded,
            overlap=overlap_reduce,
            wire_dtype=wire_dtype,
        )
        for bucket in self.frozen:
            self.dropped |= drop_gradients(place.parameter for place in bucket.placed)
        self.gatherer: Gatherer | None = None
        sharded = [bucket for bucket in buckets if bucket.parameters_sharded]
        if sharded:
            self.gatherer = Gatherer(model, sharded, units, limits or Limits())
            self.reduction.on_complete = self._done_with
        self._gathers: dict[int, Pending] = {}
        self._finished_early = False
        self._register(units)

    def _register(self, units: list[str]) -> None:
        """Learn of gradients as they come, and of parameters before they are read."""
        describe(self.model.parameters() if self.lifetimes.parameters_sharded else ())
        for parameter in self.reduction.home:
            self.hung(parameter.register_post_accumulate_grad_hook(partial(_ready, weakref.ref(self))))
        overlaps = self.overlap_gather and self.lifetimes.optimizer_sharded and self.group.size > 1
        if overlaps:
            self._wait_before_use(self.model, units)
        if overlaps or self.gatherer is not None:
            for module in self.model.modules():
                watched = (self._before_read, self._wait_for, self._before_copy)
                module._parameters = OnAccess(module._parameters, *watched)
                self._undo.append(partial(stop_watching, module))

    def _lay_out(
        self,
        model: nn.Module,
        units: list[str],
        limit: int | None,
        threshold: int,
        trained: Callable[[nn.Parameter], bool],
    ) -> list[Bucket]:
        """All buckets: trained parameters, for stage 3 frozen ones too, small ones of stage 3 apart."""
        self._small: set[nn.Parameter] = set()
        if self._shards_parameters:
            self._small = {p for p in model.parameters() if p.numel() < threshold}

        def kind(parameter: nn.Parameter) -> object:
            train = parameter.requires_grad and trained(parameter)
            if not train and not (self._shards_parameters and parameter.is_floating_point()):
                return None
            return train, parameter.requires_grad

        sharded = self.lifetimes.optimizer_sharded

        def lay_out(units: list[str], small: bool) -> list[Bucket]:
            return make_buckets(
                model,
                units,
                self.group,
                sharded=sharded,
                limit=limit,
                wanted=lambda p: kind(p) if (p in self._small) == small else None,
                trained=trained,
            )

        return lay_out(units, small=False) + (lay_out([], small=True) if self._small else [])

    def _stays_whole(self, bucket: Bucket) -> bool:
        """Stage 3: it is small, or nobody else has a part of it that this rank could do without."""
        return bucket.placed[0].parameter in self._small or (bucket.group.size == 1 and self.homes.param == "none")

    def copies_of(self, parameter: nn.Parameter) -> AxisGroup:
        """The ranks that hold data-parallel copies of it."""
        return spec_of("", parameter).copies or self.group

    # gradients

    @property
    def sync(self) -> bool:
        """False while a backward only accumulates: the boundary of gradient accumulation is a later one."""
        return self.reduction.sync

    @sync.setter
    def sync(self, value: bool) -> None:
        self.reduction.sync = value

    @property
    def local_sums(self) -> list[Tensor]:
        """Sum of each bucket's gradients on this rank alone, in the last step."""
        return self.reduction.local_sums

    def expect(self, arrivals: Callable[[nn.Parameter], int], micro_batches: int = 1) -> None:
        """How often a gradient comes for a micro-batch (in a pipeline once for each stage that holds the parameter),
        and how many micro-batches a pipeline takes at once."""
        if self._shards_gradients and micro_batches > 1:
            self.reduction.expect(arrivals, ordered=False)
        else:
            self.reduction.expect(lambda parameter: micro_batches * arrivals(parameter), ordered=True)

    def gradient_ready(self, parameter: nn.Parameter) -> None:
        """Take `parameter.grad`."""
        self._resume()
        self.reduction.gradient_ready(parameter)

    def count_unused(self) -> float:
        """Parameters that got no gradient on this rank since the last step."""
        return float(len(self.reduction.home) - len(self.reduction.ever_filled))

    def end_backward(self, *, ran: bool = True) -> None:
        """After a backward: stages 2 and 3 reduce what is left. Collective. `ran` False: perhaps one, ended already."""
        if ran:
            self._resume()  # on a rank to which the backward gave nothing
        if self._shards_gradients:
            self.reduction.end_round(after_backward=ran)
        if self.gatherer is not None:
            self.gatherer.end_backward()

    def discard(self) -> None:
        """Forget all gradients since the last step. Every rank does."""
        self.reduction.discard()
        self._finished_early = False

    def finish_reduction(self) -> None:
        """Reduce what is left and wait. Afterwards each bucket's `reduced` is the sum over all ranks."""
        for bucket in self.buckets:
            bucket.check_memory()
        self.wait_parameters()  # what no forward has used may still be on its way, and the step will change it
        if not self._finished_early or self.reduction.is_unfinished():
            self.reduction.finish()
        self._finished_early = False
        if self.gatherer is not None:
            self.gatherer.end_backward()

    def finish_reduction_early(self) -> None:
        """The same before the step, to see or change the gradients; more of them are added to these."""
        if self.reduction.is_unfinished():
            self.finish_reduction()
            self._finished_early = True

    def _resume(self) -> None:
        """A backward after `finish_reduction_early`, in the same step."""
        if self._finished_early:
            self._finished_early = False
            self.reduction.resume()

    def _done_with(self, bucket: Bucket) -> None:
        """Stage 3: its whole parameters are needed no more."""
        if self.gatherer is not None and bucket.parameters_sharded:
            self.gatherer.let_go(self.gatherer.of[bucket.placed[0].parameter])

    # parameters

    @torch.no_grad()
    def publish(self) -> None:
        """After the step: make the updated masters the parameters of every rank."""
        for index in reversed(range(len(self.buckets))):  # the order in which forward needs them
            self.publish_bucket(index)
        self.end_publish()

    @torch.no_grad()
    def publish_bucket(self, index: int, master: Tensor | None = None) -> None:
        """The same for one bucket. `master`: its updated master, when it is not where `bucket.master` finds it."""
        bucket = self.buckets[index]
        self._done_with(bucket)
        bucket.cast_master(master)
        if self.lifetimes.optimizer_sharded and bucket.group.size > 1 and not bucket.parameters_sharded:
            assert bucket.values is not None
            self._gathers[index] = all_gather_slices(bucket.values, bucket.group, bucket.padding)

    def end_publish(self) -> None:
        """After the last bucket."""
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
        home = self.reduction.home
        for name, module in model.named_modules():
            if innermost(name, units) and name not in at_once:
                continue  # the unit has waited
            indices = {home[p][0] for p in module.parameters(recurse=name in at_once) if p in home}
            if indices:
                self.hung(module.register_forward_pre_hook(Hook(_wait_hook, self, sorted(indices))))

    def _before_read(self, parameter: nn.Parameter) -> None:
        """A module's parameter is read, perhaps by code that never calls the module."""
        self._wait_for(parameter)
        if self.gatherer is not None:
            self.gatherer.on_access(parameter)

    def _wait_for(self, parameter: nn.Parameter) -> None:
        if self._gathers and (found := self.reduction.home.get(parameter)) is not None:
            self.wait_parameters([found[0]])

    def _before_copy(self, parameters: Iterable[nn.Parameter]) -> None:
        """A module with these is copied or pickled."""
        self.wait_parameters()
        if self.gatherer is not None:
            self.gatherer.refuse_copy(parameters)

    # letting go

    def hung(self, handle: RemovableHandle) -> None:
        """Remember how to take it off the module."""
        self._undo.append(handle.remove)

    def take_off(self) -> None:
        """Take off what hangs on the module and its parameters. No gradient is taken any more."""
        for undo in [*self._undo, *(handle.remove for handle in self.dropped.values())]:
            undo()
        if self.gatherer is not None:
            self.gatherer.take_off()
        self._undo, self.dropped = [], {}

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
            first, reduced = bucket.owned[0], bucket.reduced
            parts = (reduced[lo - first : hi - first] for lo, hi in runs)
            norms += [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack([norm.to(self.device) for norm in norms]).double().square().sum()

    def scale_gradients(self, factor: Tensor | float) -> None:
        """Multiply the owned gradients."""
        for bucket in self.buckets:
            bucket.reduced.mul_(factor)

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

    def frozen_shards(self) -> list[tuple[Bucket, int, Tensor]]:
        """Stage 3: parameters that are not trained, in the model's type, as `pieces` takes them."""
        return [(bucket, bucket.slice[0], bucket.shard) for bucket in self.frozen]


def _ready(zero: weakref.ref[Zero], parameter: nn.Parameter) -> None:
    """The hook of a parameter. Python's collector does not see through a tensor's hooks: one that held its Zero would
    keep the model, its memory and its process groups for ever."""
    if (owner := zero()) is not None:
        owner.gradient_ready(parameter)


def _wait_hook(zero: Zero, indices: list[int], module: nn.Module, args: object) -> None:
    zero.wait_parameters(indices)
