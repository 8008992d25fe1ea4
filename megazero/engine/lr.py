"""The learning rate's course as a value: a pure function of the updates made so far. Imports no torch.

    lr |    ____________            n = updates made, so iteration i (none skipped) runs with at(i - 1)
       |   /            \\           W = warmup, D = where the decay ends, r = (n - W) / (D - W)
       |  /              \\__ min    WSD: stable until D - wsd, then q = (n - D + wsd) / wsd runs from 0 to 1
       +--W-------------D----- n

Formulas: Megatron-LM's megatron/core/optimizer_param_scheduler.py, which counts samples where this counts iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from megazero.base.errors import CheckpointError, ConfigError
from megazero.config.schema import OptimizerConfig

_OVERRIDE = "--override-opt-param-scheduler"


@dataclass(frozen=True)
class LearningRate:
    """One course of the learning rate. Fields are OptimizerConfig's, resolved, in iterations."""

    lr: float
    min_lr: float
    lr_decay_style: str
    lr_decay_iters: int
    lr_warmup_iters: float
    """Of lr-decay-iters if lr_warmup_fraction was given; need not be whole then, as in Megatron."""
    lr_warmup_fraction: float | None
    lr_warmup_style: str
    """linear: n / W of the way; log: log n / log W (DeepSpeed's lr_schedules.py)."""
    lr_warmup_init: float
    lr_wsd_decay_style: str
    lr_wsd_decay_iters: int
    derived: frozenset[str] = field(default=frozenset(), compare=False)
    """Which of lr_decay_iters and lr_wsd_decay_iters the user did not state; not part of the course."""

    @classmethod
    def from_config(cls, optimizer: OptimizerConfig, derived: Iterable[str] = ()) -> LearningRate:
        """The course that a resolved configuration asks for; `derived` names the fields that `resolve` filled in.

        Raises ConfigError, with all problems, when the parts of the course do not fit in each other.
        """
        decay, fraction = optimizer.lr_decay_iters, optimizer.lr_warmup_fraction
        assert decay is not None, "lr_decay_iters is not filled in: resolve the configuration first"
        warmup = optimizer.lr_warmup_iters if fraction is None else fraction * decay
        wsd = optimizer.lr_wsd_decay_iters or 0 if optimizer.lr_decay_style == "WSD" else 0
        problems = []
        if not 0 <= warmup < decay:
            problems.append(
                f"a warmup of {warmup:g} iterations with lr-decay-iters {decay}: the warmup must end before the decay "
                "does. Lower --lr-warmup-iters (or -fraction), or raise --lr-decay-iters."
            )
        elif optimizer.lr_decay_style == "WSD" and not 0 < wsd <= decay - warmup:
            problems.append(
                f"lr-wsd-decay-iters {wsd} with lr-decay-iters {decay} and a warmup of {warmup:g}: the decay must fit "
                f"between warmup and end. Give --lr-wsd-decay-iters from 1 to {math.floor(decay - warmup)}."
            )
        for name in ("min_lr", "lr_warmup_init"):
            value = getattr(optimizer, name)
            if not 0 <= value <= optimizer.lr:
                problems.append(
                    f"{name} {value:g} with lr {optimizer.lr:g}: it must lie between 0 and lr. Change {_flag(name)}."
                )
        if problems:
            raise ConfigError(*problems)
        copied = {f.name: getattr(optimizer, f.name) for f in fields(cls) if f.name != "derived"}
        copied |= {"lr_warmup_iters": warmup, "lr_wsd_decay_iters": wsd}
        return cls(**copied, derived=frozenset(derived))

    def at(self, n: int) -> float:
        """The learning rate of the update that follows `n` updates; a skipped iteration is not an update."""
        warmup, decay = self.lr_warmup_iters, self.lr_decay_iters
        if warmup > 0 and n <= warmup:
            done, whole = float(n), float(warmup)
            if self.lr_warmup_style == "log":
                done, whole = math.log(max(n, 1)), math.log(max(warmup, 2))
            return self.lr_warmup_init + (self.lr - self.lr_warmup_init) * done / whole
        if self.lr_decay_style == "constant":
            return self.lr
        if n > decay:
            return self.min_lr
        if self.lr_decay_style == "inverse-square-root":
            return max(self.min_lr, self.lr * math.sqrt(max(warmup, 1)) / math.sqrt(max(n, 1)))
        if self.lr_decay_style == "WSD":
            remaining = self._wsd_remaining(n)
        else:
            remaining = _remaining(self.lr_decay_style, (n - warmup) / (decay - warmup))
        return self.min_lr + remaining * (self.lr - self.min_lr)

    @property
    def decay_start(self) -> float:
        """Updates after which the learning rate first falls: the end of the warmup, or of WSD's stable phase."""
        return self.lr_decay_iters - self.lr_wsd_decay_iters if self.lr_decay_style == "WSD" else self.lr_warmup_iters

    def state(self) -> dict[str, Any]:
        """The course as plain values for a checkpoint's state.json."""
        return {name: value for name, value in asdict(self).items() if name != "derived"}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LearningRate:
        """The course that `state` saved. Raises CheckpointError when it is not one of ours."""
        names = {f.name for f in fields(cls)} - {"derived"}
        state = {"lr_warmup_style": "linear"} | state  # there was no other when older checkpoints were written
        if state.keys() != names:
            raise CheckpointError(
                f"the checkpoint's learning rate has the entries {', '.join(sorted(state))}, expected "
                f"{', '.join(sorted(names))}: another version wrote it. Start from its weights alone with --finetune."
            )
        return cls(**state)

    def _wsd_remaining(self, n: int) -> float:
        if n <= self.decay_start:
            return 1.0
        return _remaining(self.lr_wsd_decay_style, (n - self.decay_start) / self.lr_wsd_decay_iters)


def _remaining(shape: str, done: float) -> float:
    """Share of lr - min_lr that is left when `done` (0 to 1) of a decay is behind."""
    if shape == "linear":
        return 1.0 - done
    if shape == "cosine":
        return 0.5 * (math.cos(math.pi * done) + 1.0)
    if shape == "exponential":
        return 2.0 * math.pow(0.5, done) - 1.0
    assert shape == "minus_sqrt", shape
    return 1.0 - math.sqrt(done)


def merge(
    current: LearningRate, stored: LearningRate, *, updates: int, train_iters: int, override: bool
) -> tuple[LearningRate, str | None]:
    """The course of a run that resumes after `updates` updates, and a warning if it is not what one may expect.

    The checkpoint keeps its course (`stored`); the command's (`current`) is taken where it changes no learning rate
    that was already used:

    - constant and inverse-square-root runs, and any run still in its warmup, can be made longer freely;
    - WSD can be made longer or shorter until its decay begins: the stable phase goes on, and the decay comes at the
      new end. To lengthen a WSD run that has decayed, resume from a checkpoint before its decay (`--ckpt-step`);
    - cosine and linear never can, nor WSD within its decay. If only --train-iters grew, the stored decay is finished
      and the rest runs at min_lr, with a warning. If the command states another course, that is a ConfigError.

    `override` (--override-opt-param-scheduler) takes the command's course at once, whatever jump that makes.
    """
    if override:
        return current, None
    if current.lr_warmup_fraction is not None and current.lr_warmup_fraction == stored.lr_warmup_fraction:
        current = replace(current, lr_warmup_iters=stored.lr_warmup_iters)  # of the length that the run began with
    if current == stored or all(current.at(n) == stored.at(n) for n in range(updates)):
        return current, None
    problems = [
        f"{_given(current, f.name)}, but the checkpoint's run has {_given(stored, f.name)}, and its learning rate has "
        f"followed that for {updates} updates. Give {_given(stored, f.name)}, or take this command's course from here "
        f"on with {_OVERRIDE}."
        for f in fields(LearningRate)
        if f.name not in ("derived", "lr_warmup_fraction", *current.derived)
        and getattr(current, f.name) != getattr(stored, f.name)
    ]
    if problems:
        raise ConfigError(*problems)
    return stored, _length_warning(stored, updates, train_iters)


def _length_warning(rate: LearningRate, updates: int, train_iters: int) -> str | None:
    """What to know when the run's length changed and its decay could not."""
    end = rate.lr_decay_iters
    if train_iters == end:
        return None
    if train_iters < end:
        text = (
            f"the run ends at iteration {train_iters}, before the checkpoint's learning-rate decay does at {end}: "
            f"its last learning rate is {rate.at(train_iters - 1):.3g}, not {rate.min_lr:.3g}."
        )
    else:
        text = (
            f"the checkpoint's learning-rate decay ends at iteration {end}; iterations {max(end, updates) + 1} to "
            f"{train_iters} run at {rate.min_lr:.3g} (min-lr)."
        )
    if rate.lr_decay_style == "WSD":
        text += (
            f" To move the decay, resume from a checkpoint before it began: --ckpt-step {rate.decay_start:g} or less."
        )
    return f"{text} To stretch the course over {train_iters} iterations, with a jump now: {_OVERRIDE}."


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(rate: LearningRate, name: str) -> str:
    """The flag and value that give `rate` what it has under `name`."""
    if name == "lr_warmup_iters" and rate.lr_warmup_fraction is not None:
        name = "lr_warmup_fraction"
    value = getattr(rate, name)
    return f"{_flag(name)} {f'{value:g}' if isinstance(value, float) else value}"
