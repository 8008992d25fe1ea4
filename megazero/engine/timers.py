"""Where the time of a step goes, phase by phase (wall_clock_breakdown)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Timers:
    """Milliseconds by name since they were last taken. Costs nothing when off; the device is waited for when on."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled, self.device = enabled, device
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what happens within under this name."""
        if not self.enabled:
            yield
            return
        start = self._now()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + self._now() - start

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count the calls of a method of this object under a name."""
        if not self.enabled:
            return
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        spent, self._spent = self._spent, {}
        return spent

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1e3
