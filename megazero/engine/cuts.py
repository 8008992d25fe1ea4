"""Cuts: flat pieces of the masters that a torch optimizer steps on, and cutting them further.

    before    [ w3 | w2 | w1 ]  one cut, states [n], one `step`
    after     [ w3 ][ w2 ][ w1 ]  views of the same memory; each has a `step` of its own from now on

torch keeps numbers such as Adam's `step` for each parameter, and does not touch parameters without a gradient. A cut of
several has one such number, so it is divided where some of them have a gradient in a step and others have none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megazero.base.errors import ConfigError
from megazero.zero.buckets import Bucket, Placed


@dataclass(frozen=True)
class Cut:
    """Elements [start, stop) of a bucket, all of one parameter group (and, for optimizers that need whole tensors, of
    one parameter)."""

    bucket: Bucket
    start: int
    stop: int
    flat: nn.Parameter
    """The master's view that the optimizer knows."""
    place: Placed
    """The first parameter in it."""

    def part_of(self, owned: Tensor) -> Tensor:
        """The cut's part of a buffer over the bucket's owned elements."""
        base = self.bucket.owned[0]
        return owned[self.start - base : self.stop - base]

    def places(self) -> list[Placed]:
        """All parameters of which it holds elements."""
        return [place for place, _, _ in self.bucket.parts(self.start, self.stop)]


def per_element(value: object) -> bool:
    """Whether an optimizer's state is one with a number for each element."""
    return isinstance(value, Tensor) and value.dim() > 0


def divided(cut: Cut, key: Callable[[Placed], object], optimizer: torch.optim.Optimizer) -> list[Cut]:
    """The cut, or several in its place where `key` differs between its parameters: views of its master and its states,
    with copies of the numbers that hold for all of it.

    Raises ConfigError for states that cannot be cut by elements.
    """
    runs: list[tuple[object, Placed, int, int]] = []
    for place, lo, hi in cut.bucket.parts(cut.start, cut.stop):
        found = key(place)
        if runs and runs[-1][0] == found:
            runs[-1] = (found, runs[-1][1], runs[-1][2], hi)
        else:
            runs.append((found, place, lo, hi))
    if len(runs) == 1:
        return [cut]
    state = optimizer.state.pop(cut.flat, {})
    parts = []
    for _, place, lo, hi in runs:
        first, last = lo - cut.start, hi - cut.start
        part = Cut(cut.bucket, lo, hi, nn.Parameter(cut.flat.detach()[first:last]), place)
        if state:
            optimizer.state[part.flat] = {
                name: _part(value, first, last, cut, f"{name!r} of {type(optimizer).__name__}")
                for name, value in state.items()
            }
        parts.append(part)
    _replace(optimizer, cut.flat, [part.flat for part in parts])
    return parts


def _part(value: Any, first: int, last: int, cut: Cut, what: str) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.numel() == 1:
        return value.clone()
    if type(value) is Tensor and value.shape == (cut.stop - cut.start,):
        return value[first:last]
    names = ", ".join(place.spec.name for place in cut.places()[:4])
    raise ConfigError(
        f"the state {what} is not one number an element, so it cannot be cut where some parameters have no gradient in "
        f"a step and others have one (among {names}). Use an optimizer with plain states, such as AdamW instead of its "
        "8-bit form, or let every parameter have a gradient in every step (add 0 * its sum to the loss)."
    )


def _replace(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: Sequence[nn.Parameter]) -> None:
    """Put these in the place of one that a group lists."""
    for group in optimizer.param_groups:
        for at, parameter in enumerate(group["params"]):
            if parameter is old:
                group["params"][at : at + 1] = new
                return
