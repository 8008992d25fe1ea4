"""The loss scale of fp16 training: a constant, or a power of two that rides the edge of overflow. Imports no torch.

    overflow:  hysteresis left? use one up.  Else scale ← max(scale / 2, minimum); already there: NonFiniteError
    clean:     after `window` clean steps behind the first one since an overflow, scale ← 2·scale, hysteresis refilled

The rules are DeepSpeed's (deepspeed/runtime/fp16/loss_scaler.py): the first clean step does not count towards the
window, hysteresis once used up stays so until the next growth (until the next clean step with consecutive_hysteresis).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megazero.base.errors import CheckpointError, ConfigError, NonFiniteError

LARGEST = 2.0**127
"""Where growth ends: the last power of two that fp32 holds."""


class LossScaler:
    """What the loss is multiplied with before backward, and gradients are divided by after.

    Args:
        loss_scale: above 0 a constant; 0 is dynamic, and the rest is of that.
        initial_loss_scale: where it starts.
        loss_scale_window: clean steps until it doubles.
        hysteresis: overflows until it halves; 1 is at once.
        consecutive_hysteresis: a clean step refills hysteresis.
        min_loss_scale: never below this.
    """

    def __init__(
        self,
        loss_scale: float = 0.0,
        initial_loss_scale: float = 2.0**16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        consecutive_hysteresis: bool = False,
        min_loss_scale: float = 1.0,
    ) -> None:
        _check(loss_scale, initial_loss_scale, loss_scale_window, hysteresis, min_loss_scale)
        self.dynamic = loss_scale == 0
        self.scale = float(initial_loss_scale if self.dynamic else loss_scale)
        self.window, self.hysteresis, self.minimum = loss_scale_window, hysteresis, float(min_loss_scale)
        self.consecutive = consecutive_hysteresis
        self._left = hysteresis
        """Overflows that may come before the scale halves, and the one that halves it."""
        self._updates = 0
        self._last_overflow = -1
        """Number of the update that overflowed last."""

    def update(self, overflow: bool) -> str | None:
        """Take note of a step's outcome; what to tell the user if it overflowed.

        Raises NonFiniteError when the scale is at its minimum and cannot be halved.
        """
        if not self.dynamic:
            return f"gradients overflowed at the constant loss scale {self.scale:g}" if overflow else None
        text = None
        if overflow:
            text = self._shrink()
            self._last_overflow = self._updates
        else:
            self._grow()
        self._updates += 1
        return text

    def _shrink(self) -> str:
        if self._left > 1:
            self._left -= 1
            return (
                f"gradients overflowed at loss scale {self.scale:g}, which halves at the {_ordinal(self._left)} "
                "overflow from here"
            )
        if self.scale <= self.minimum:
            raise NonFiniteError(
                f"gradients overflow at loss scale {self.scale:g}, the smallest allowed (min_loss_scale "
                f"{self.minimum:g}). The run has diverged, or fp16 is too narrow for it: lower the learning rate, clip "
                "the gradients, train in bf16, or lower min_loss_scale."
            )
        before, self.scale = self.scale, max(self.scale / 2, self.minimum)
        return f"gradients overflowed at loss scale {before:g}; it is {self.scale:g} from here"

    def _grow(self) -> None:
        if self.consecutive:
            self._left = self.hysteresis
        clean = self._updates - self._last_overflow - 1
        if clean > 0 and clean % self.window == 0:
            self._left = self.hysteresis
            self.scale = min(self.scale * 2, LARGEST)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint's state.json."""
        return {
            "scale": self.scale,
            "hysteresis_left": self._left,
            "updates": self._updates,
            "last_overflow": self._last_overflow,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved. A constant scale stays what it is. Raises CheckpointError for another kind."""
        if set(state) != set(self.state()):
            raise CheckpointError(
                f"the checkpoint's loss scaler has the entries {', '.join(sorted(state))}, expected "
                f"{', '.join(sorted(self.state()))}: another version wrote it. Start from its weights alone."
            )
        if self.dynamic:
            self.scale = max(float(state["scale"]), self.minimum)
            self._left = min(int(state["hysteresis_left"]), self.hysteresis)
            self._updates, self._last_overflow = int(state["updates"]), int(state["last_overflow"])


def _ordinal(number: int) -> str:
    return {1: "next", 2: "second", 3: "third"}.get(number, f"{number}th")


def _check(scale: float, initial: float, window: int, hysteresis: int, minimum: float) -> None:
    problems = []
    if not 0 <= scale <= LARGEST:
        problems.append(f"loss_scale {scale:g}: it is 0 (dynamic) or positive, at most 2^127. Give 0.")
    for name, number in {"loss_scale_window": window, "hysteresis": hysteresis}.items():
        if number < 1:
            problems.append(f"{name} {number}: it is 1 or more. Give {1000 if 'window' in name else 2}.")
    if not 0 < minimum <= LARGEST:
        problems.append(f"min_loss_scale {minimum:g}: it is positive, at most 2^127. Give 1.")
    elif scale == 0 and not minimum <= initial <= LARGEST:
        problems.append(
            f"initial_loss_scale {initial:g} with min_loss_scale {minimum:g}: it lies between that and 2^127. Give "
            f"{max(65536.0, minimum):g} (initial_scale_power 16 is 65536)."
        )
    if problems:
        raise ConfigError(*problems)
