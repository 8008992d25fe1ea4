"""DeepSpeed's warmup schedules: WarmupLR, WarmupDecayLR, WarmupCosineLR (deepspeed/runtime/lr_schedules.py).

it = number of the last step, from 0 (-1 before the first); W = max(2, warmup_num_steps), T = total_num_steps
log     γ = ln(it + 1) / ln W    WarmupLR        min + γ·(max - min), then max
linear  γ = it / W               WarmupDecayLR   then min + (max - min)·(T - it) / (T - W)
                                 WarmupCosineLR  then lr·(c + (1 - c)·(1 + cos π(it - W + 1)/(T - W)) / 2)
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from megazero.base.errors import ConfigError
from megazero.config.decode import did_you_mean
from megazero.engine.schedulers.base import Schedule, Values, checked_count, each_group

WARMUP_TYPES = ("log", "linear")


class WarmupLR(Schedule):
    """From warmup_min_lr to warmup_max_lr (None: each group's lr) over warmup_num_steps, then constant."""

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: Values = 0.0,
        warmup_max_lr: Values | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.warmup_num_steps = max(2, checked_count("warmup_num_steps", warmup_num_steps))
        self.warmup_type = _warmup_type(warmup_type)
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.min_lrs = each_group(optimizer, warmup_min_lr, "warmup_min_lr")
        self.max_lrs = each_group(optimizer, warmup_max_lr, "warmup_max_lr")
        super().__init__(optimizer, last_batch_iteration)

    def initial_lr(self) -> list[float]:
        return list(self.min_lrs)

    def get_lr(self) -> list[float]:
        if self.last_batch_iteration < 0:
            return self.initial_lr()
        gamma = self._gamma()
        return [low + (high - low) * gamma for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _gamma(self) -> float:
        if self.last_batch_iteration < self.warmup_num_steps:
            return _warmed(self.warmup_type, self.last_batch_iteration, self.warmup_num_steps)
        return self._after_warmup()

    def _after_warmup(self) -> float:
        return 1.0


class WarmupDecayLR(WarmupLR):
    """WarmupLR, then a straight line down to warmup_min_lr at total_num_steps."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: Values = 0.0,
        warmup_max_lr: Values | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _total(total_num_steps, warmup_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)

    def _after_warmup(self) -> float:
        length = max(1.0, self.total_num_steps - self.warmup_num_steps)
        return max(0.0, (self.total_num_steps - self.last_batch_iteration) / length)


class WarmupCosineLR(Schedule):
    """Each group's lr times a ratio: warmup_min_ratio to 1, then half a cosine to cos_min_ratio at total_num_steps."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.warmup_num_steps = max(2, checked_count("warmup_num_steps", warmup_num_steps))
        self.total_num_steps = _total(total_num_steps, warmup_num_steps)
        self.warmup_type = _warmup_type(warmup_type)
        self.warmup_min_ratio, self.cos_min_ratio = warmup_min_ratio, cos_min_ratio
        self.org_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer, last_batch_iteration)

    def initial_lr(self) -> list[float]:
        return [0.0] * len(self.org_lrs)

    def get_lr(self) -> list[float]:
        ratio = self.get_lr_ratio()
        return [lr * ratio for lr in self.org_lrs]

    def get_lr_ratio(self) -> float:
        """What each group's learning rate is multiplied with; 0 before the first step."""
        it, warmup = self.last_batch_iteration, self.warmup_num_steps
        if it < 0:
            return 0.0
        if it < warmup:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * _warmed(self.warmup_type, it, warmup)
        progress = min(1.0, (it - warmup + 1) / max(1, self.total_num_steps - warmup))
        falling = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, self.cos_min_ratio + (1 - self.cos_min_ratio) * falling)


def _warmed(kind: str, it: int, length: int) -> float:
    """How far the warmup is, 0 to 1."""
    return math.log(it + 1) / math.log(length) if kind == "log" else it / length


def _warmup_type(value: str) -> str:
    if value not in WARMUP_TYPES:
        raise ConfigError(
            f"warmup_type {value!r} is unknown.{did_you_mean(str(value), WARMUP_TYPES)} Give "
            f"{' or '.join(WARMUP_TYPES)}."
        )
    return value


def _total(total: object, warmup: object) -> int:
    steps, warmup = checked_count("total_num_steps", total), checked_count("warmup_num_steps", warmup)
    if steps < warmup:
        warnings.warn(
            f"total_num_steps {steps} is below warmup_num_steps {warmup}: the run ends before its warmup does, and the "
            "learning rate never reaches its maximum. Raise the one, or lower the other.",
            stacklevel=3,
        )
    return steps
