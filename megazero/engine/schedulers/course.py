"""The native learning-rate course of a RunConfig, as a scheduler for `initialize()`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megazero.base.errors import ConfigError
from megazero.config.derive import steps_of_samples
from megazero.config.schema import RunConfig
from megazero.engine.lr import LearningRate
from megazero.engine.schedulers.base import Schedule


class Course(Schedule):
    """The learning rate of a course (LearningRate) for all groups, as the native loop sets it."""

    def __init__(self, optimizer: Any, rate: LearningRate, last_batch_iteration: int = -1) -> None:
        self.rate = rate
        super().__init__(optimizer, last_batch_iteration)

    def initial_lr(self) -> list[float]:
        return self.get_lr()

    def get_lr(self) -> list[float]:
        return [self.rate.at(self.last_batch_iteration + 1)] * len(self.optimizer.param_groups)


def course_of(config: RunConfig) -> LearningRate:
    """The course that the section `optimizer` asks for; its length is `training.train_iters` where it states none.

    Raises ConfigError for a course that needs a length where there is none, or whose parts do not fit in each other.
    """
    optimizer = config.optimizer
    length = optimizer.lr_decay_iters or config.training.train_iters or steps_of_samples(config.training)
    if length is None and optimizer.lr_decay_style == "constant" and optimizer.lr_warmup_fraction is None:
        length = optimizer.lr_warmup_iters + 1  # nothing decays
    if length is None:
        raise ConfigError(
            f"optimizer.lr_decay_style {optimizer.lr_decay_style!r} needs to know how long the training is. Give "
            'training.train_iters or optimizer.lr_decay_iters, lr_decay_style="constant" without lr_warmup_fraction, '
            "or a scheduler of your own to initialize()."
        )
    wsd = optimizer.lr_wsd_decay_iters or max(length // 10, 1)
    return LearningRate.from_config(replace(optimizer, lr_decay_iters=length, lr_wsd_decay_iters=wsd))
