"""Whole parameters for a while, outside forward: `with GatheredParameters(params, modifier_rank=0): …`."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from megazero.parallel.collectives import broadcast
from megazero.parallel.topology import AxisGroup
from megazero.zero.access import owner_of, write_changes, write_weights
from megazero.zero.buckets import Bucket, Placed
from megazero.zero.init import Init, cut, restore, slice_of
from megazero.zero.status import in_order, is_available
from megazero.zero.zero import Zero

__all__ = ["GatheredParameters", "Init"]


class GatheredParameters:
    """Parameters are whole inside the block, at every stage, and after `Init`. Collective.

    Args:
        params: a parameter or several; None and tensors that are whole anyway are left alone. All of them are whole at
            once: for a norm of each, go through them one by one.
        modifier_rank: global rank whose changes inside the block become everyone's, master weights included; elements
            that it has not changed keep their fp32 masters. None: the block only reads.
        fwd_module: DeepSpeed's; parameters that other modules read are gathered by themselves here.
        enabled: False makes the block do nothing.

    Raises ValueError at the end of the block when parameters were changed without a modifier_rank: the change would be
    lost; and for what is no tensor.
    """

    def __init__(
        self,
        params: nn.Parameter | Iterable[nn.Parameter | None] | None,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        listed: list[Any] = [params] if params is None or isinstance(params, Tensor) else list(params)
        given = [entry for entry in listed if entry is not None]
        if strange := [entry for entry in given if not isinstance(entry, Tensor)]:
            raise ValueError(
                f"GatheredParameters takes parameters, got {strange[0]!r:.60} ({type(strange[0]).__name__}): pass "
                "module.weight, [module.weight, module.bias] or module.parameters()"
            )
        self.params = in_order(list(dict.fromkeys(given if enabled else [])))
        self.modifier_rank = modifier_rank
        self._held: list[tuple[Zero, list[int]]] = []
        self._restored: set[nn.Parameter] = set()
        """Those that `Init` has cut and this block, not one around it, has made whole."""

    @torch.no_grad()
    def __enter__(self) -> GatheredParameters:
        held: dict[int, tuple[Zero, set[int]]] = {}
        for parameter in self.params:
            owner = owner_of(parameter)
            if owner is not None:
                self._check_rank(owner.zero.copies_of(parameter))
                owner.zero.wait_parameters()
                gatherer = owner.zero.gatherer
                if gatherer is not None and parameter in gatherer.of:
                    held.setdefault(id(owner.zero), (owner.zero, set()))[1].add(gatherer.of[parameter])
            elif (known := slice_of(parameter)) is not None:
                self._check_rank(known.group)
                if not is_available(parameter):
                    restore(parameter)
                    self._restored.add(parameter)
        self._held = [(zero, sorted(indices)) for zero, indices in held.values()]
        for zero, indices in self._held:
            assert zero.gatherer is not None
            zero.gatherer.hold(indices)
        watched = self.params if self.modifier_rank is None else []
        self._before = {p: p.detach().clone() for p in watched if owner_of(p) or slice_of(p)}
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        changed = []
        if kind is None:
            if self.modifier_rank is None:
                changed = [p for p, before in self._before.items() if not torch.equal(before, p.detach())]
                self._before = {}
            else:
                for parameter in self.params:
                    self._keep_changes(parameter, self.modifier_rank)
        for zero, indices in self._held:
            assert zero.gatherer is not None
            zero.gatherer.unhold(indices)
        for parameter in self.params:
            if (known := slice_of(parameter)) is None:
                continue
            source = known.group.ranks.index(self.modifier_rank) if self.modifier_rank is not None else 0
            if parameter in self._restored:
                cut(parameter, known.group, known.own.device, source)
            elif kind is None and self.modifier_rank is not None:  # the block around this one cuts it
                parameter.data.copy_(broadcast(parameter.data.contiguous(), known.group, source))
        self._restored.clear()
        if changed:
            shapes = ", ".join(str(tuple(p.shape)) for p in changed[:3])
            raise ValueError(
                f"{len(changed)} parameters (of shapes {shapes}) were changed inside GatheredParameters without a "
                "modifier_rank, and the change would be lost: pass modifier_rank=0, which makes rank 0's values "
                "everyone's."
            )

    def _keep_changes(self, parameter: nn.Parameter, modifier_rank: int) -> None:
        owner = owner_of(parameter)
        if owner is None:
            return
        group = owner.zero.copies_of(parameter)
        value = broadcast(parameter.detach().contiguous(), group, group.ranks.index(modifier_rank))
        home = home_of(owner.zero, parameter)
        if home is None:  # not trained, and whole on every rank
            parameter.copy_(value)
            return
        bucket, place = home
        if bucket.trainable:
            write_changes(bucket, place, value)
        write_weights(owner.zero, bucket, place, value)
        if bucket.values is not None:
            parameter.data = place.of(bucket.values)  # the block may have given it other memory

    def _check_rank(self, group: AxisGroup) -> None:
        if self.modifier_rank is not None and self.modifier_rank not in group.ranks:
            raise ValueError(
                f"modifier_rank {self.modifier_rank} does not hold these parameters: choose one of the ranks "
                f"{', '.join(map(str, group.ranks))}"
            )


def home_of(zero: Zero, parameter: nn.Parameter) -> tuple[Bucket, Placed] | None:
    """Where a parameter of `zero` is; None for one that is in no bucket."""
    places = ((b, place) for b in [*zero.buckets, *zero.frozen] for place in b.placed)
    return next(((bucket, place) for bucket, place in places if place.parameter is parameter), None)


def register_external_parameter(module: nn.Module, parameter: Any) -> None:
    """DeepSpeed's way to announce a parameter that another module reads. Such reads are noticed here: this checks that
    it is a parameter.

    Raises ValueError if it is none.
    """
    if not isinstance(parameter, nn.Parameter):
        raise ValueError(f"register_external_parameter takes an nn.Parameter, got {type(parameter).__name__}")
