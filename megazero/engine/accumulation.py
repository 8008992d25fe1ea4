"""Which micro-batch of a step this is, and by what the step's gradient is divided.

    micro_steps  0 1 2 3 │ 4 5 6 7 │ …      gradient_accumulation_steps = 4; │ = boundary, an update

A gradient is the sum over micro-batches and ranks until the update, which divides it once: by accumulation · dp, or,
when the caller said over how many items each loss is a mean, by the number of items.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Meaning = Literal["micro-batch", "part", "count"]
"""What one loss is: the mean of a micro-batch; already divided by the accumulation; the mean of `count` items."""


class Accumulation:
    """Counters of one engine. `steps` is gradient_accumulation_steps."""

    def __init__(self, steps: int, replicas: int, device: torch.device) -> None:
        self.steps, self.replicas, self.device = steps, replicas, device
        self.micro_steps = 0
        self.global_steps = 0
        self.skipped_steps = 0
        self.applied = False
        """Whether the last `step()` changed the weights."""
        self.forced: bool | None = None
        """What the caller says about the boundary; None: count."""
        self.unit = 1.0
        """What counts are divided by before they multiply a loss, so that fp16 gradients do not overflow by them."""
        self.held = 0
        """How many no_sync() are open."""
        self.begin()

    def begin(self) -> None:
        """A new window, of no micro-batches."""
        self.meaning: Meaning | None = None
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)
        """Sum over this window's backwards of loss · weight, on this rank."""
        self.items = torch.zeros((), dtype=torch.float64, device=self.device)

    @property
    def at_boundary(self) -> bool:
        """Whether the present micro-batch is the last before an update."""
        return self.forced if self.forced is not None else (self.micro_steps + 1) % self.steps == 0

    @property
    def reduces_now(self) -> bool:
        """Whether the present backward may start the reduction that ends the window."""
        return self.at_boundary and not self.held

    def add(self, loss: Tensor, count: Tensor | float | None, meaning: Meaning) -> None:
        """Note the loss of one backward. Raises RuntimeError when it means something else than those before it."""
        if self.meaning not in (None, meaning):
            raise RuntimeError(
                f"backward() got a loss that is a {_SAID[meaning]} after one that is a {_SAID[self.meaning]}, within "
                "one step: their sum has no meaning. Give `count`, and `scale_wrt_gas`, alike in every backward of a "
                "step."
            )
        self.meaning = meaning
        weight = 1.0 if count is None else count
        self.total += loss.detach().double() * weight
        if count is not None:
            self.items += count

    @property
    def divisor(self) -> float | None:
        """What divides the summed gradient; None: the number of items of all ranks."""
        if self.meaning == "count":
            return None
        return float(self.replicas * (1 if self.meaning == "part" else self.steps))

    @contextmanager
    def hold(self) -> Iterator[None]:
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def state(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("micro_steps", "global_steps", "skipped_steps")}

    def load(self, state: dict[str, int]) -> None:
        """Go on from counters of another number of micro-batches a step, perhaps."""
        self.micro_steps, self.global_steps = state["micro_steps"], state["global_steps"]
        self.skipped_steps = state["skipped_steps"]

    def restart(self) -> None:
        """Count from the beginning of a window: the gradients of the present one are gone."""
        self.micro_steps -= self.micro_steps % self.steps
        self.begin()


_SAID: dict[Meaning | None, str] = {
    "micro-batch": "mean of a micro-batch",
    "part": "part of the step's mean (scale_wrt_gas=False)",
    "count": "mean of `count` items",
}
