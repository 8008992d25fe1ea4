"""A module from its engine back to its owner, with the weights of the last step.

    stages 0-2   bucket ─► each parameter its own memory
    stage 3      bucket ─ all-gather ─► slices as `Init` cuts them ─► the next bucket; whole one bucket at a time

What hung on the module is taken off, and every buffer is freed whoever holds the Zero still. The next engine takes the
values over as it takes over any module's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.parallel.collectives import all_gather_slices
from megazero.zero.access import owner_of, unregister
from megazero.zero.adopt import forget_specs
from megazero.zero.buckets import Bucket
from megazero.zero.init import cut
from megazero.zero.zero import Zero


def release_model(model: nn.Module, by: str) -> None:
    """Have every engine let go that holds a parameter of `model`. Collective. `by`: who asks for it, in words.

    An engine that merely moved a frozen parameter to its device holds nothing of it, and keeps what it has.
    """
    owners = {owner: None for p in model.parameters() if (owner := owner_of(p)) is not None and _holds(owner.zero, p)}
    for owner in owners:
        if owner.let_go is not None:
            owner.let_go(by)
        else:
            hand_back(owner.zero, exact=True)


def _holds(zero: Zero, parameter: nn.Parameter) -> bool:
    """Whether its memory or its gradients are handled there."""
    buckets = [*zero.buckets, *zero.frozen]
    return parameter in zero.dropped or any(place.parameter is parameter for b in buckets for place in b.placed)


@torch.no_grad()
def hand_back(zero: Zero, *, exact: bool) -> None:
    """Make the model an ordinary one again, and free all that `zero` has in memory. Collective.

    Args:
        exact: parameters of a 16-bit model get the values and the type of their fp32 masters, for an engine that makes
            masters of them. Else they stay in the model's type.

    Raises ConfigError inside a GatheredParameters block, whose parameters are held.
    """
    if zero.gatherer is not None and zero.gatherer.is_pinned():
        raise ConfigError(
            "the parameters of this module are held by a GatheredParameters block, or by a forward that is running: "
            "its engine cannot let go of it now. Do it after the block."
        )
    zero.discard()
    zero.wait_parameters()
    if zero.gatherer is not None:
        zero.gatherer.end_backward()
    zero.take_off()
    unregister(zero)
    forget_specs(zero.model)
    for bucket in zero.buckets:
        bucket.free_gradients()
    for bucket in [*zero.buckets, *zero.frozen]:
        _hand_back(bucket, exact)
    zero.buckets, zero.frozen = [], []


def _hand_back(bucket: Bucket, exact: bool) -> None:
    values = _whole_masters(bucket) if exact and bucket.has_uncast_masters() else _whole_values(bucket)
    for place in bucket.placed:
        place.parameter.data = place.of(values)
        if bucket.parameters_sharded:
            cut(place.parameter, bucket.group, bucket.place.shard_device)
        else:
            place.parameter.data = place.parameter.data.clone()
    bucket.free()


def _whole_masters(bucket: Bucket) -> Tensor:
    """fp32 [length] on the bucket's device. Collective where each rank has a slice."""
    first, last = bucket.owned
    flat = torch.empty(bucket.length, device=bucket.device)
    flat[first:last].copy_(bucket.master)
    if last - first < bucket.length:
        all_gather_slices(flat, bucket.group, bucket.padding).wait()
    return flat


def _whole_values(bucket: Bucket) -> Tensor:
    """[length] in the model's type. Collective at stage 3."""
    if bucket.values is not None:
        return bucket.values
    flat = torch.empty(bucket.length, dtype=bucket.dtype, device=bucket.device)
    transfer = bucket.fetch_shard(flat[bucket.slice[0] : bucket.slice[1]])
    if transfer is not None:
        transfer.wait()
    all_gather_slices(flat, bucket.group, bucket.padding).wait()
    return flat
