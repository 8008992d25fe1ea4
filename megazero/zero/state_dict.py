"""`module.state_dict()` and `load_state_dict()` as in plain torch, at every stage.

Stage 3 gathers a unit while its entries are copied out. Loading writes masters from what is given, before it is cast to
the model's type, so that the next update goes on from there; with assign=True too values are copied. Both are
collective.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megazero.zero.access import write_master, write_weights
from megazero.zero.buckets import Bucket, Placed
from megazero.zero.gather import Gatherer
from megazero.zero.hooks import Hook
from megazero.zero.zero import Zero


def register_hooks(zero: Zero) -> None:
    """Let the state dicts of the model and of all its modules hold whole tensors."""
    homes = {place.parameter: (bucket, place) for bucket in [*zero.buckets, *zero.frozen] for place in bucket.placed}
    gatherer = zero.gatherer
    for module in zero.model.modules():
        own = {name: homes[p] for name, p in module._parameters.items() if p is not None and p in homes}
        if not own:
            continue
        parameters = [place.parameter for _, place in own.values()]
        indices = [] if gatherer is None else sorted({gatherer.of[p] for p in parameters if p in gatherer.of})
        zero.hung(module.register_load_state_dict_pre_hook(Hook(_before_load, zero, own, indices)))
        zero.hung(module.register_load_state_dict_post_hook(Hook(_after_load, gatherer, indices)))
        zero.hung(module.register_state_dict_pre_hook(Hook(_before_save, zero, indices)))
        if gatherer is not None and indices:
            zero.hung(module.register_state_dict_post_hook(Hook(_after_save, gatherer, indices, list(own))))
    if gatherer is not None:  # once a unit, not once for each module inside it
        modules = dict(zero.model.named_modules())
        for unit, indices in gatherer.units.items():
            if unit and any(True for _ in modules[unit].children()):
                zero.hung(modules[unit].register_state_dict_pre_hook(Hook(_before_save, zero, indices)))
                zero.hung(modules[unit].register_state_dict_post_hook(Hook(_after_save, gatherer, indices, [])))


def _before_save(zero: Zero, indices: list[int], module: nn.Module, prefix: str, keep_vars: bool) -> None:
    zero.wait_parameters()
    if zero.gatherer is not None:
        zero.gatherer.hold(indices)


def _after_save(
    gatherer: Gatherer,
    indices: list[int],
    names: list[str],
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
) -> None:
    for name in names:
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor):
            state_dict[prefix + name] = value.detach().clone()
    gatherer.unhold(indices)


@torch.no_grad()
def _before_load(
    zero: Zero,
    own: dict[str, tuple[Bucket, Placed]],
    indices: list[int],
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    *rest: Any,
) -> None:
    local_metadata["assign_to_params_buffers"] = False  # no step would reach what is put in a parameter's place
    zero.wait_parameters()
    if zero.gatherer is not None:
        zero.gatherer.hold(indices)
    for name, (bucket, place) in own.items():
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and tuple(value.shape) == place.spec.local_shape:  # torch reports the others
            if bucket.trainable:
                write_master(bucket, place, value)
            write_weights(zero, bucket, place, value)


def _after_load(gatherer: Gatherer | None, indices: list[int], module: nn.Module, incompatible: Any) -> None:
    if gatherer is not None:
        gatherer.unhold(indices)
