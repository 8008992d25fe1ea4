"""What all of DeepSpeed's schedules have in common: counting steps, writing learning rates down, checking arguments.

They set `lr` in the groups of anything that has `param_groups`. Call step() once after each update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megazero.base.errors import CheckpointError, ConfigError

Values = float | Sequence[float]
"""One number for all groups, or one for each."""


class Schedule:
    """What all have in common: counting steps and writing the learning rates down."""

    def __init__(self, optimizer: Any, last_batch_iteration: int) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] | None = None
        if last_batch_iteration == -1:
            self._begin()

    def initial_lr(self) -> list[float]:
        """The learning rates of the first step, one a group."""
        raise NotImplementedError

    def get_lr(self) -> list[float]:
        """The learning rates after step number `last_batch_iteration`, one a group."""
        raise NotImplementedError

    def get_last_lr(self) -> list[float]:
        """The learning rates that were set last, one a group."""
        if self._last_lr is None:
            raise RuntimeError(
                f"{type(self).__name__} has not set a learning rate yet: it was made with last_batch_iteration "
                f"{self.last_batch_iteration}, to go on from there. Call step() first."
            )
        return self._last_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Count one update (or go to this one), and set what follows from it."""
        following = self.last_batch_iteration + 1
        self.last_batch_iteration = following if last_batch_iteration is None else last_batch_iteration
        self._apply()

    def state_dict(self) -> dict[str, int]:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on where this was saved, with the learning rates of then. Raises CheckpointError for another's state."""
        if set(state_dict) != {"last_batch_iteration"}:
            raise CheckpointError(
                f"the scheduler's state has the entries {', '.join(sorted(state_dict)) or '(none)'}, but "
                f"{type(self).__name__}'s has last_batch_iteration alone: another scheduler wrote it. Use that one, or "
                "load without the scheduler's state."
            )
        self.last_batch_iteration = state_dict["last_batch_iteration"]
        if self.last_batch_iteration < 0:
            self._begin()
        else:
            self._apply()

    def _begin(self) -> None:
        self._last_lr = _set_rates(self.optimizer.param_groups, self.initial_lr())

    def _apply(self) -> None:
        self._last_lr = _set_rates(self.optimizer.param_groups, self.get_lr())


def each_group(optimizer: Any, value: Values, name: str) -> list[float]:
    """The value as one number a group. Raises ConfigError when a list has another length."""
    groups = len(optimizer.param_groups)
    if not isinstance(value, list | tuple):
        return [value] * groups  # type: ignore[list-item]
    if len(value) != groups:
        raise ConfigError(
            f"{name} has {len(value)} values, and the optimizer {groups} parameter groups. Give one number for all, or "
            f"{groups}."
        )
    return list(value)


def checked_count(name: str, value: object) -> int:
    """A whole number above 0. Raises ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name} must be a whole number above 0, got {value!r}.")
    return value


def _set_rates(groups: list[dict[str, Any]], rates: list[float]) -> list[float]:
    for group, rate in zip(groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return list(rates)
