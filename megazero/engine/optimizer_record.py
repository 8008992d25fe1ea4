"""What a checkpoint says of optimizer states beside their tensors, and whether an engine's optimizer can take them.

family    classes of the optimizer: [AdamW, Adam]
states    per-element states, in files: [exp_avg, exp_avg_sq]
scalars   states that are one number, of most parameters: {step: 100}
apart     the same of other parameters, which had no gradient in some steps: {layers.3.weight: {step: 70}}
without   parameters that had none in any step, so that torch keeps no state for them either
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megazero.base.errors import CheckpointError
from megazero.engine.optimizer import ShardOptimizer, most_common
from megazero.engine.optimizers.element_wise import kept_states
from megazero.engine.optimizers.fused import _Fused
from megazero.parallel.collectives import gather_objects
from megazero.parallel.topology import AxisGroup


def record(shards: ShardOptimizer, group: AxisGroup) -> dict[str, Any]:
    """The record of all ranks of `group`, for state.json. Collective."""
    mine = shards.numbers()
    of_ranks = gather_objects((shards.state_keys(), shards.scalars(), any(v is not None for v in mine.values())), group)
    common = most_common(scalars for _, scalars, steps in of_ranks if steps)
    stepped = any(steps for *_, steps in of_ranks)
    others = gather_objects({name: numbers for name, numbers in mine.items() if stepped and numbers != common}, group)
    apart = {name: numbers for of_rank in others for name, numbers in sorted(of_rank.items())}
    return {
        "family": family(shards.optimizer),
        "states": sorted({key for keys, *_ in of_ranks for key in keys}),
        "scalars": common,
        "apart": {name: numbers for name, numbers in apart.items() if numbers is not None},
        "without": [name for name, numbers in apart.items() if numbers is None],
    }


def make_room(shards: ShardOptimizer, stored: Mapping[str, Any]) -> None:
    """Make the states of a record, to be filled from its checkpoint. Older ones have the same numbers for all."""
    shards.prepare(stored["states"], stored["scalars"], stored.get("apart", {}), stored.get("without", ()))


def family(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's class and of the optimizers that it derives from."""
    inner = getattr(optimizer, "optimizer", None)  # of a wrapper, such as accelerate's
    kind = type(inner if isinstance(inner, torch.optim.Optimizer) else optimizer)
    found = [c.__name__ for c in kind.__mro__ if issubclass(c, torch.optim.Optimizer)]
    return [name for name in dict.fromkeys(found) if name not in (torch.optim.Optimizer.__name__, _Fused.__name__)]


def check_fits(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any], settings: list[Any], path: Path) -> None:
    """Raise CheckpointError for states that the optimizer has no use for, or that lack what it needs.

    Optimizers of one family fit, and those that keep states of the same names.

    Args:
        stored: a record; older ones do not say which family.
        settings: stored hyper-parameters of each group, on which it depends what is kept.
    """
    own, theirs = family(optimizer), stored.get("family", [])
    if set(own) & set(theirs) or not (theirs or stored["states"]):
        return
    kept = kept_states(optimizer, settings)
    if kept is None or (kept and kept == set(stored["states"])):
        return
    saved_by = theirs[0] if theirs else "another optimizer"
    raise CheckpointError(
        f"{path} has the states of {saved_by} ({_listed(stored['states'])}), and this engine's optimizer is {own[0]}, "
        f"which keeps others ({_listed(kept)}). Load it with load_optimizer_states=False, for the weights without the "
        f"optimizer, or train on with {theirs[0] if theirs else 'the optimizer that saved it'}."
    )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
