"""The optimizer that `initialize` hands out: a torch Optimizer by type, the engine by action.

`step` and `zero_grad` are the engine's. `param_groups` are those of the optimizer that steps on this rank's shards:
writing a group's "lr" there works as ever, its "params" are flat fp32 pieces of the masters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch

from megazero.base.errors import ConfigError
from megazero.engine.optimizer import ShardOptimizer


class Front(Protocol):
    """What the view needs of the engine."""

    @property
    def loss_scale(self) -> float: ...
    @property
    def overflow(self) -> bool: ...
    def step(self) -> None: ...
    def zero_grad(self) -> None: ...


class OptimizerView(torch.optim.Optimizer):
    """See the module. Other attributes are those of the shards' optimizer."""

    def __init__(self, engine: Front, shards: ShardOptimizer) -> None:
        self._engine, self._shards = engine, shards  # torch's __init__ would want parameters to own

    @property
    def inner(self) -> torch.optim.Optimizer | None:
        """The optimizer that steps on the shards; None where this rank has nothing to step on."""
        return self._shards.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [] if self.inner is None else self.inner.param_groups

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:  # type: ignore[override]
        return defaultdict(dict) if self.inner is None else self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return {} if self.inner is None else self.inner.defaults

    @property
    def overflow(self) -> bool:
        """Whether the last step found gradients that were not finite."""
        return self._engine.overflow

    @property
    def loss_scale(self) -> float:
        return self._engine.loss_scale

    @property
    def cur_scale(self) -> float:
        return self._engine.loss_scale

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """`engine.step()`: counts a micro-batch, and updates the weights at the boundary.

        Raises ConfigError for a closure: the engine cannot compute a loss again in the middle of its step.
        """
        if closure is not None:
            raise ConfigError("optimizer.step(closure) is not possible here. Call engine.backward(loss), then step().")
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """`engine.zero_grad()`."""
        self._engine.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ConfigError: shards are laid out once."""
        raise ConfigError(
            "add_param_group: shards are laid out when initialize() is called. Give all groups there (a group with "
            "lr 0 does not move)."
        )

    def state_dict(self) -> dict[str, Any]:
        """The groups' hyper-parameters. The state itself lives in shards, which engine.save_checkpoint saves."""
        return {"state": {}, "param_groups": [settings_of(group) | {"params": []} for group in self.param_groups]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the hyper-parameters from what `state_dict` gave. Raises ConfigError for a dict with state in it."""
        if state_dict.get("state"):
            raise ConfigError(
                "optimizer.load_state_dict: this holds the state of whole parameters, and an engine's is in shards. "
                "Use engine.load_checkpoint()."
            )
        load_settings(self.param_groups, state_dict["param_groups"])

    def __repr__(self) -> str:
        return f"OptimizerView({self.inner!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        for holder in (self._shards, self._shards.optimizer):
            if hasattr(holder, name):
                return getattr(holder, name)
        raise AttributeError(f"neither the engine's optimizer nor {type(self.inner).__name__} has {name!r}")


def settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """A group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def load_settings(groups: list[dict[str, Any]], stored: list[dict[str, Any]]) -> None:
    """Write stored hyper-parameters into the groups. Raises ConfigError when their numbers differ."""
    if len(groups) != len(stored):
        raise ConfigError(
            f"the optimizer has {len(groups)} parameter groups, and {len(stored)} were stored. Make it with the groups "
            "that it had."
        )
    for group, values in zip(groups, stored, strict=True):
        group.update(settings_of(values))
