"""Gradients on their way from autograd to the shards.

    gradient_ready ─► grads[place] += gradient ─► bucket complete? ─► reduce-scatter (overlaps backward) ─► reduced

Stages 0 and 1 reduce once, at the boundary of gradient accumulation; stages 2 and 3 after every backward, and add the
result to the shard. A reduction is started when a bucket's last gradient has come and those before it have started, so
that every rank issues the same communication in the same order, whatever its data used. A gradient that comes after
its bucket was reduced (a second loss, a reentrant checkpoint) opens the bucket again: sums of sums are the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megazero.parallel.collectives import Pending, all_gather_slices, all_reduce, reduce_scatter_slices
from megazero.zero.buckets import Bucket, Placed

IN_FLIGHT = 2
"""Reductions of stages 2 and 3 that may be under way at once: each holds a whole bucket of gradients."""


class Reduction:
    """The gradient side of ZeRO over `buckets` (trainable ones), each over its own group.

    Args:
        sharded: stages 2 and 3.
        gather: stage 0: every rank gets the whole sums.
        wire_dtype: type in which gradients travel; None is their own.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        *,
        sharded: bool,
        gather: bool,
        overlap: bool,
        wire_dtype: torch.dtype | None,
    ) -> None:
        self.buckets, self.sharded, self.gather = buckets, sharded, gather
        self.overlap, self.wire_dtype = overlap, wire_dtype
        self.home: dict[nn.Parameter, tuple[int, Placed]] = {
            place.parameter: (index, place) for index, bucket in enumerate(buckets) for place in bucket.placed
        }
        self.sync = True
        """False while a backward only accumulates (stages 0 and 1): the boundary is a later one."""
        self.on_complete: Callable[[Bucket], None] = lambda bucket: None
        """Told when all gradients of a bucket have come, so that its parameters are needed no more."""
        self.local_sums: list[Tensor] = []
        """Sum of each bucket's gradients on this rank alone, since the last step."""
        self.ever_filled: set[nn.Parameter] = set()
        """Parameters that got a gradient on this rank since the last step."""
        self._lengths = Counter(bucket.length for bucket in buckets)
        self._free: dict[int, list[Tensor]] = {}  # whole-bucket buffers of stages 2 and 3, by length
        self._carried: dict[int, Tensor] = {}  # stages 0, 1: what this rank's slice was when its bucket opened again
        self._stored: set[int] = set()  # buckets of stages 2 and 3 whose shard holds something of this step
        self._kept: dict[int, Tensor] = {}  # what `finish` made of this step's first backwards, where more have come
        self._fresh = True  # a step has ended: forget what was asked about it at the next gradient
        self.expect(lambda parameter: 1, ordered=True)

    def expect(self, arrivals: Callable[[nn.Parameter], int], *, ordered: bool) -> None:
        """How many gradients come for a parameter until it may be reduced. `ordered` False: reduce in the order in
        which buckets are complete, where that is known to be the same on all ranks (a pipeline's schedule)."""
        self._arrivals = {parameter: arrivals(parameter) for parameter in self.home}
        self._ordered = ordered
        self._begin_round()

    def _begin_round(self) -> None:
        """A round is one pass of reductions over all buckets."""
        self._filled: list[set[nn.Parameter]] = [set() for _ in self.buckets]
        self._missing = [self._expected(index) for index in range(len(self.buckets))]
        self._next = 0  # buckets before this one are on their way
        self._under_way: dict[int, Pending] = {}
        self._again: set[int] = set()  # started in this round, and gradients have come since

    def _expected(self, index: int) -> int:
        return sum(self._arrivals[place.parameter] for place in self.buckets[index].placed)

    @torch.no_grad()
    def gradient_ready(self, parameter: nn.Parameter) -> None:
        """Move `parameter.grad` into its bucket; start reducing buckets that are complete."""
        assert parameter.grad is not None
        if self._fresh:
            self._forget()
        index, place = self.home[parameter]
        bucket = self.buckets[index]
        if not self._ordered and self.sharded:
            self._finish(index)  # of an earlier micro-batch: its buffer is free again
        elif index < self._next:
            self._open_again(index)
        grads = self._buffer(bucket)
        target = place.of(grads)
        gradient = parameter.grad if parameter.grad.layout == torch.strided else parameter.grad.to_dense()
        if parameter in self._filled[index]:
            target.add_(gradient)
        else:
            target.copy_(gradient)
            self._filled[index].add(parameter)
            self.ever_filled.add(parameter)
        parameter.grad = None
        if not (self.sync or self.sharded):
            return
        self._missing[index] -= 1
        if self._missing[index] == 0:
            self.on_complete(bucket)
        if not self._ordered:
            if self._missing[index] <= 0:
                self._start(index)
                self._missing[index] = self._expected(index)
        elif self.overlap or self.sharded:
            while self._next < len(self.buckets) and self._missing[self._next] <= 0:
                self._reduce_next()

    def _forget(self) -> None:
        self._fresh = False
        device = self.buckets[0].device
        self.local_sums = [torch.zeros((), device=device) for _ in self.buckets]
        self.ever_filled = set()

    def _open_again(self, index: int) -> None:
        """A gradient has come for a bucket that is on its way: finish that, and start another sum."""
        if index in self._again:
            return
        self._again.add(index)
        self._finish(index)
        if not self.sharded:
            bucket = self.buckets[index]
            assert bucket.grads is not None
            own = bucket.grads[bucket.slice[0] : bucket.slice[1]]
            self._carried[index] = own.clone()
        self._filled[index] = set()

    def _reduce_next(self) -> None:
        self._next += 1
        self._start(self._next - 1)

    def _start(self, index: int) -> None:
        bucket = self.buckets[index]
        if self._fresh:
            self._forget()
        self._finish(index)
        if self.sharded and not self._filled[index] and not self._ordered:
            return
        grads = self._buffer(bucket)
        for place in bucket.placed:
            if place.parameter not in self._filled[index]:  # unused
                grads[place.start : place.stop].zero_()
        grads[bucket.numel :].zero_()
        # A sum is finite exactly when its terms are (overflow aside): tells later which rank made a bad gradient.
        self.local_sums[index] += grads.sum(dtype=torch.float32)
        if self.sharded:
            self._filled[index] = set()
            while len(self._under_way) >= IN_FLIGHT:
                self._finish(next(iter(self._under_way)))
        self._under_way[index] = reduce_scatter_slices(grads, bucket.group, self.wire_dtype, bucket.padding)
        if self.sharded and not self.overlap:
            self._finish(index)

    def _finish(self, index: int) -> None:
        """Wait for a bucket's reduction, and put the result where it is kept."""
        pending = self._under_way.pop(index, None)
        if pending is None:
            return
        pending.wait()
        bucket = self.buckets[index]
        assert bucket.grads is not None
        if self.sharded:
            own = bucket.grads[bucket.slice[0] : bucket.slice[1]]
            if index in self._stored:
                bucket.reduced.add_(own.to(bucket.reduced.device))
            else:
                bucket.reduced.copy_(own)
                self._stored.add(index)
            self._give_back(bucket)
        elif index in self._carried:
            bucket.grads[bucket.slice[0] : bucket.slice[1]] += self._carried.pop(index)

    def _buffer(self, bucket: Bucket) -> Tensor:
        """The bucket's whole gradients, made when stages 2 and 3 need them."""
        if bucket.grads is None:
            free = self._free.get(bucket.length)
            bucket.grads = (
                free.pop() if free else torch.empty(bucket.length, dtype=bucket.grad_dtype, device=bucket.device)
            )
        return bucket.grads

    def _give_back(self, bucket: Bucket) -> None:
        assert bucket.grads is not None
        if self._lengths[bucket.length] > 1:  # else no other bucket of this backward can take it
            self._free.setdefault(bucket.length, []).append(bucket.grads)
        bucket.grads = None

    def has_come(self) -> bool:
        """Whether a gradient has come since the last round."""
        return self._next > 0 or bool(self._under_way) or any(self._filled)

    def is_unfinished(self) -> bool:
        """Whether a gradient has come since the last `finish`."""
        return self.has_come() or bool(self._stored) or bool(self._kept)

    def resume(self) -> None:
        """After a `finish` that did not end the step: more gradients come, and are added to its sums."""
        self._fresh = False
        for index, bucket in enumerate(self.buckets):
            if self.sharded and bucket.grad_sum is None:
                self._stored.add(index)
            else:
                self._kept[index] = self._own(bucket).clone()

    def _own(self, bucket: Bucket) -> Tensor:
        """This rank's slice of the sums."""
        if self.sharded:
            return bucket.reduced
        assert bucket.grads is not None
        return bucket.grads[bucket.slice[0] : bucket.slice[1]]

    @torch.no_grad()
    def end_round(self, *, after_backward: bool = False) -> None:
        """Reduce what is left and wait. Collective. `after_backward`: one is known to have run, whether or not it
        gave this rank a gradient."""
        if not (self.has_come() or after_backward or not self.sharded):
            return
        if self._ordered:
            while self._next < len(self.buckets):
                self._reduce_next()
        for index in sorted(self._again) if self._ordered else range(len(self.buckets)):
            if self._filled[index]:
                self._start(index)
        for index in list(self._under_way):
            self._finish(index)
        self._begin_round()

    @torch.no_grad()
    def finish(self) -> None:
        """At the boundary: afterwards each bucket's `reduced` is the sum over all ranks and micro-batches."""
        if self._fresh:
            self._forget()  # no gradient came on this rank
        self.end_round()
        gathers = []
        for index, bucket in enumerate(self.buckets):
            own = self._own(bucket)
            if self.sharded and index not in self._stored:
                own.zero_()
            if bucket.grad_sum is not None:
                all_reduce(own, bucket.grad_sum)
            if (kept := self._kept.pop(index, None)) is not None:
                own.add_(kept)
            if self.gather and bucket.grads is not None:
                gathers.append(all_gather_slices(bucket.grads, bucket.group, bucket.padding))
        for pending in gathers:
            pending.wait()
        self._stored = set()
        self._free = {}
        self._fresh = True

    def discard(self) -> None:
        """Forget all gradients since the last step. Every rank does."""
        for index in list(self._under_way):
            self._finish(index)
        self._begin_round()
        self._carried, self._stored, self._kept, self._free = {}, set(), {}, {}
        self._fresh = True
