"""Whole tensors of one parameter, at every stage: fp32 master, gradient, optimizer state; reading and writing.

A parameter knows its Zero through `owner_of`. Reading is collective over the ranks that hold copies (the ZeRO group,
or fewer for spread experts): each gets the whole tensor, of the shape that the parameter has on its rank (its part
under tensor parallelism). The names are DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.parallel.collectives import all_reduce
from megazero.zero.buckets import Bucket, Placed
from megazero.zero.zero import Zero

# An attribute, not a global map: the owner holds its parameters, so that a map would keep both for ever.
_OWNER = "_megazero_owner"
States = Callable[[Bucket, str], list[tuple[int, Tensor]]]


class Owner:
    """What stands behind a parameter: its Zero, and where the optimizer keeps its states."""

    def __init__(self, zero: Zero, states: States) -> None:
        self.zero, self.states = zero, states
        self.factor: Callable[[], float] = lambda: 1.0
        """What the reduced gradients are multiplied by, to be the mean that the optimizer sees."""
        self.let_go: Callable[[str], None] | None = None
        """Makes its engine let go of the model; told who asks for it. None: there is no engine."""

    def __reduce__(self) -> Any:  # a pickled parameter has no owner
        return type(None), ()


def register(zero: Zero, states: States) -> Owner:
    """Let the functions of this file find the parameters of `zero`. `states`: per-element optimizer states of a bucket
    by name, each with its first element; empty for a state that is not there.

    The engine sets `factor` and `let_go` of what is returned.
    """
    owner = Owner(zero, states)
    for parameter in zero.model.parameters():
        setattr(parameter, _OWNER, owner)
    return owner


def unregister(zero: Zero) -> None:
    """Undo `register`, where no later engine has registered itself."""
    for parameter in zero.model.parameters():
        owner = owner_of(parameter)
        if owner is not None and owner.zero is zero:
            delattr(parameter, _OWNER)


def owner_of(parameter: nn.Parameter) -> Owner | None:
    owner: Owner | None = getattr(parameter, _OWNER, None)
    return owner


def safe_get_full_fp32_param(parameter: nn.Parameter) -> Tensor | None:
    """The whole fp32 master [parameter's shape]; None for a parameter that is not trained by an engine. Collective."""
    found = _find(parameter)
    if found is None:
        return None
    owner, bucket, place = found
    return _whole(owner.zero, bucket, place, [(bucket.owned[0], bucket.master)])


def safe_get_full_grad(parameter: nn.Parameter) -> Tensor | None:
    """The whole gradient, fp32: the mean over ranks and micro-batches, unscaled, not clipped. Collective.

    To be called at the boundary of accumulation, between the last backward and step(): it ends the reduction. Before it
    this is the part that has come so far, and what comes later is added to it. None for a parameter that is not trained
    by an engine.
    """
    found = _find(parameter)
    if found is None:
        return None
    owner, bucket, place = found
    owner.zero.finish_reduction_early()
    return _whole(owner.zero, bucket, place, [(bucket.owned[0], bucket.reduced)]).mul_(owner.factor())


def safe_get_full_optimizer_state(parameter: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """One whole optimizer state, e.g. exp_avg, fp32; None before the parameter's first step. Collective."""
    found = _find(parameter)
    if found is None:
        return None
    owner, bucket, place = found
    buffers = _states_of(owner, bucket, place, optim_state_key)
    known = all_reduce(torch.tensor(float(bool(buffers)), device=owner.zero.device), bucket.group, "max")
    return _whole(owner.zero, bucket, place, buffers) if bool(known) else None


def safe_set_full_fp32_param(parameter: nn.Parameter, value: Tensor) -> None:
    """Make `value` (the parameter's shape, the same on every rank) its master and its weights. Collective."""
    owner, bucket, place = _must_find(parameter, value)
    write_master(bucket, place, value)
    write_weights(owner.zero, bucket, place, value)


def safe_set_full_grad(parameter: nn.Parameter, value: Tensor) -> None:
    """Replace the gradient that the next step() uses, as `safe_get_full_grad` gives it. Collective."""
    owner, bucket, place = _must_find(parameter, value)
    owner.zero.finish_reduction_early()
    _write(bucket, place, value / owner.factor(), [(bucket.owned[0], bucket.reduced)])


def safe_set_full_optimizer_state(parameter: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Replace one optimizer state. Raises ValueError for a state that is not there."""
    owner, bucket, place = _must_find(parameter, value)
    anywhere = owner.states(bucket, optim_state_key)
    buffers = _states_of(owner, bucket, place, optim_state_key)
    if not (buffers if place.overlap(*bucket.owned) else anywhere) and list(bucket.parts(*bucket.owned)):
        raise ValueError(
            f"{place.spec.name} has no optimizer state {optim_state_key!r}: states come with the first step"
        )
    _write(bucket, place, value, buffers)


def write_master(bucket: Bucket, place: Placed, value: Tensor) -> None:
    """Make `value` [local shape] the fp32 master of one parameter, as far as this rank holds it."""
    _write(bucket, place, value, [(bucket.owned[0], bucket.master)])


def write_changes(bucket: Bucket, place: Placed, value: Tensor) -> None:
    """The same where `value` is not what the master casts to: 16-bit weights that nobody has changed leave the rest of
    their masters' digits alone."""
    first, master = bucket.owned[0], bucket.master
    if (part := place.overlap(first, first + master.numel())) is not None:
        lo, hi = part
        own = master[lo - first : hi - first]
        given = value.detach().reshape(-1)[lo - place.start : hi - place.start].to(own)
        own.copy_(torch.where(own.to(bucket.dtype).to(own) == given, own, given))


def write_weights(zero: Zero, bucket: Bucket, place: Placed, value: Tensor) -> None:
    """Make `value` [local shape] the weights of one parameter on this rank, whatever holds them."""
    with torch.no_grad():
        flat = value.detach().reshape(-1).to(device=bucket.device, dtype=bucket.dtype)
        if bucket.values is not None:
            bucket.values[place.start : place.stop].copy_(flat)
        if bucket.parameters_sharded:
            _write(bucket, place, value, [(bucket.slice[0], bucket.shard)])


def _states_of(owner: Owner, bucket: Bucket, place: Placed, key: str) -> list[tuple[int, Tensor]]:
    return [(at, t) for at, t in owner.states(bucket, key) if place.overlap(at, at + t.numel()) is not None]


def _find(parameter: nn.Parameter) -> tuple[Owner, Bucket, Placed] | None:
    owner = owner_of(parameter)
    if owner is None or parameter not in owner.zero.reduction.home:
        return None
    index, place = owner.zero.reduction.home[parameter]
    owner.zero.wait_parameters()
    return owner, owner.zero.buckets[index], place


def _must_find(parameter: nn.Parameter, value: Tensor) -> tuple[Owner, Bucket, Placed]:
    found = _find(parameter)
    if found is None:
        raise ConfigError("this parameter is not trained by an engine: write it with torch.no_grad() and copy_ instead")
    if tuple(value.shape) != found[2].spec.local_shape:
        raise ValueError(
            f"{found[2].spec.name} has shape {found[2].spec.local_shape}, the value {tuple(value.shape)}: give the "
            "whole tensor"
        )
    return found


@torch.no_grad()
def _whole(zero: Zero, bucket: Bucket, place: Placed, buffers: Iterable[tuple[int, Tensor]]) -> Tensor:
    """One parameter out of every rank's part of it: each element comes from the rank whose slice it is in."""
    whole = torch.zeros(place.stop - place.start, dtype=torch.float32, device=zero.device)
    for first, tensor in buffers:
        low, high = max(first, bucket.slice[0]), min(first + tensor.numel(), bucket.slice[1])
        if (part := place.overlap(low, high)) is not None:
            lo, hi = part
            whole[lo - place.start : hi - place.start] = tensor[lo - first : hi - first].to(whole)
    return all_reduce(whole, bucket.group).view(place.spec.local_shape)


@torch.no_grad()
def _write(bucket: Bucket, place: Placed, value: Tensor, buffers: Iterable[tuple[int, Tensor]]) -> None:
    flat = value.detach().reshape(-1)
    for first, tensor in buffers:
        if (part := place.overlap(first, first + tensor.numel())) is not None:
            lo, hi = part
            tensor[lo - first : hi - first] = flat[lo - place.start : hi - place.start].to(tensor)
