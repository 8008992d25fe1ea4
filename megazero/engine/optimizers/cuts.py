"""Making a torch optimizer that was built over whole parameters step on other tensors: ZeRO's flat cuts of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megazero.engine.optimizers.fused import _Fused, can_fuse


def repoint(optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[nn.Parameter]]) -> None:
    """Let the optimizer's groups hold these tensors from now on, one list for each; its state starts anew.

    A list may be empty. Names of parameters are dropped, since a cut may belong to several.
    """
    assert len(groups) == len(optimizer.param_groups)
    optimizer.state = defaultdict(dict)
    for group, cuts in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = list(cuts)
        group.pop("param_names", None)
        if isinstance(optimizer, _Fused) and not group.get("fused") and not group.get("foreach"):
            group["fused"] = can_fuse(cuts, optimizer.fused_devices) or None  # it was made over tensors on meta, say
    start_states(optimizer)


def start_states(optimizer: torch.optim.Optimizer) -> None:
    """Make the states that a class makes in its constructor, not in its first step: torch's Adagrad does."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if "sum" not in state:
                state["step"] = _step_of(parameter, bool(group.get("fused")))
                state["sum"] = torch.full_like(parameter.detach(), group["initial_accumulator_value"])


def _step_of(parameter: Tensor, fused: bool) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=parameter.device if fused else None)
