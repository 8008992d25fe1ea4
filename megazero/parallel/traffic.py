"""What this rank hands to the network, counted by axis and operation: every collective and send of a step.

    on the wire, n bytes over N ranks:   all-reduce 2n(N-1)/N      send n
                                         reduce-scatter, all-gather, all-to-all, broadcast n(N-1)/N

n is the whole tensor in the type that travels. The padding of flat buffers and the few numbers that ranks agree on
(token counts, norms) are entries of their own. A call is counted when it is made, not when it ends. Start-up, errors
and checkpoints (objects, barriers, torch.distributed.checkpoint) are not a step's and are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Operation = Literal["all-reduce", "reduce-scatter", "all-gather", "all-to-all", "broadcast", "send"]
PADDING, SCALARS = "padding", "scalars"
_SCALARS = 8  # elements; a tensor of so few is not a part of model or batch
_TIMES = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1, "all-to-all": 1, "broadcast": 1}


@dataclass(frozen=True)
class Count:
    """Calls made and bytes handed to the network."""

    calls: int = 0
    bytes: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.calls + other.calls, self.bytes + other.bytes)

    def __sub__(self, other: Count) -> Count:
        return Count(self.calls - other.calls, self.bytes - other.bytes)


Counts = Mapping[tuple[str, str], Count]
"""(axis, operation, "padding" or "scalars") -> count."""


class Traffic:
    """One rank's running totals. A topology carries one, and its groups point to it."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str], Count] = {}

    def add(
        self, axis: str, operation: Operation, size: int, *, elements: int, itemsize: int, padding: int = 0
    ) -> None:
        """Count one call over `size` ranks on `elements` elements, the last `padding` of which carry nothing."""
        share = 1.0 if operation == "send" else _TIMES[operation] * (size - 1) / size
        name: str = SCALARS if elements <= _SCALARS else operation
        self._add(axis, name, Count(1, (elements - padding) * itemsize * share))
        if padding:
            self._add(axis, PADDING, Count(0, padding * itemsize * share))

    def _add(self, axis: str, name: str, count: Count) -> None:
        self._totals[axis, name] = self._totals.get((axis, name), Count()) + count

    def totals(self) -> Counts:
        """Everything so far, as a copy."""
        return dict(self._totals)

    def since(self, before: Counts) -> Counts:
        """What has come on top of an earlier `totals`."""
        grown = {key: count - before.get(key, Count()) for key, count in self._totals.items()}
        return {key: count for key, count in grown.items() if count != Count()}


def by_axis(counts: Counts) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Bytes and calls as {axis: {operation: number}}, for records."""
    sent: dict[str, dict[str, int]] = {}
    calls: dict[str, dict[str, int]] = {}
    for (axis, name), count in sorted(counts.items()):
        sent.setdefault(axis, {})[name] = round(count.bytes)
        if count.calls:  # padding has none of its own
            calls.setdefault(axis, {})[name] = count.calls
    return sent, calls
