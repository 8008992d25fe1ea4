"""DeepSpeed's schedules after Smith, arXiv 1803.09820: LRRangeTest and OneCycle (deepspeed/runtime/lr_schedules.py)."""

from __future__ import annotations

import math
import warnings
from typing import Any

from megazero.base.errors import ConfigError
from megazero.engine.schedulers.base import Schedule, Values, checked_count, each_group


class LRRangeTest(Schedule):
    """Raises the learning rate steadily, to find where training diverges: min · (1 + rate · (it + 1) / step_size).

    `lr_range_test_staircase` takes the floor of the fraction.
    """

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: Values = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lr = each_group(optimizer, lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size = checked_count("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate, self.staircase = lr_range_test_step_rate, lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def initial_lr(self) -> list[float]:
        return list(self.min_lr)

    def get_lr(self) -> list[float]:
        interval = (self.last_batch_iteration + 1) / self.step_size
        increase = 1 + self.step_rate * (math.floor(interval) if self.staircase else interval)
        return [low * increase for low in self.min_lr]


class OneCycle(Schedule):
    """One triangle of the learning rate, min to max to min, then cycle_min_lr / (1 + decay_lr_rate · interval).

    At step (it + 1) mod (first + second): up over the first size, down over the second; a stair count moves in so many
    equal stairs. The interval is (it - first - second + 1) / decay_step_size. `cycle_momentum` mirrors it in
    betas[0], between max and min, then max · (1 + decay_mom_rate · interval); betas[1] becomes 0.99, as in DeepSpeed.
    """

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: Values,
        cycle_max_lr: Values,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: float = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: Values = 0.8,
        cycle_max_mom: Values = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        self.first = float(cycle_first_step_size)
        self.second = self.first if cycle_second_step_size is None else float(cycle_second_step_size)
        if self.first <= 0:
            raise ConfigError(f"cycle_first_step_size {cycle_first_step_size}: a number of steps above 0. Give 2000.")
        if self.second < 0:
            raise ConfigError(f"cycle_second_step_size {cycle_second_step_size}: 0 or more steps. Leave it out.")
        second_stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self.stairs = (cycle_first_stair_count, second_stairs)
        self.min_lrs = each_group(optimizer, cycle_min_lr, "cycle_min_lr")
        self.max_lrs = each_group(optimizer, cycle_max_lr, "cycle_max_lr")
        self.min_moms = each_group(optimizer, cycle_min_mom, "cycle_min_mom")
        self.max_moms = each_group(optimizer, cycle_max_mom, "cycle_max_mom")
        self.decay_step_size, self.decay_lr_rate, self.decay_mom_rate = decay_step_size, decay_lr_rate, decay_mom_rate
        self.cycle_momentum = cycle_momentum and all("betas" in group for group in optimizer.param_groups)
        if cycle_momentum and not self.cycle_momentum:
            warnings.warn(
                "OneCycle leaves the momentum alone: the optimizer's groups have no betas. Say cycle_momentum false, "
                "or take an optimizer of Adam's kind.",
                stacklevel=2,
            )
        super().__init__(optimizer, last_batch_iteration)

    def initial_lr(self) -> list[float]:
        return list(self.min_lrs)

    def get_lr(self) -> list[float]:
        interval = self._decay_interval()
        if interval is None:
            at = self._height()
            return [low + (high - low) * at for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]
        return [low / (1 + self.decay_lr_rate * interval) for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """betas after step number `last_batch_iteration`, one pair a group; None when they are not cycled."""
        if not self.cycle_momentum:
            return None
        interval = self._decay_interval()
        if interval is None:
            at = self._height()
            cycled = [high - (high - low) * at for low, high in zip(self.min_moms, self.max_moms, strict=True)]
        else:
            cycled = [high * (1 + self.decay_mom_rate * interval) for high in self.max_moms]
        return [(momentum, 0.99) for momentum in cycled]

    def _decay_interval(self) -> float | None:
        """Decay steps since the cycle ended; None during it, 0 without a decay."""
        past = self.last_batch_iteration - self.first - self.second
        if past < 0:
            return None
        return (past + 1) / self.decay_step_size if self.decay_step_size else 0.0

    def _height(self) -> float:
        """Where the triangle stands, 0 to 1."""
        at = (self.last_batch_iteration + 1) % (self.first + self.second)
        rising = at <= self.first
        done, length = (at, self.first) if rising else (self.first + self.second - at, self.second)
        stairs = self.stairs[0 if rising else 1]
        return math.floor(done * stairs / length) / stairs if stairs > 0 else done / length

    def _begin(self) -> None:
        super()._begin()
        if self.cycle_momentum:
            self._set_betas([(momentum, 0.99) for momentum in self.min_moms])

    def _apply(self) -> None:
        super()._apply()
        betas = self.get_mom()
        if betas is not None:
            self._set_betas(betas)

    def _set_betas(self, betas: list[tuple[float, float]]) -> None:
        for group, pair in zip(self.optimizer.param_groups, betas, strict=True):
            group["betas"] = pair
