"""What an engine says about itself: a line every so many steps, where the time went, where the memory is.

step 100 | loss 2.3456 | 81.2 samples/s | lr 1.000e-04 | grad norm 0.98 | loss scale 65536 | skipped 1
  ms a step, slowest rank: forward 31.0 | backward 62.1 | reduce 4.0 | step 9.5 | gather 3.3
  memory, fullest rank: weights 38.1 MiB | gradients 76.3 MiB | masters 38.1 MiB | optimizer 76.3 MiB | …
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from megazero.base.device import memory_bytes
from megazero.base.log import Log
from megazero.config.schema import LoggingConfig
from megazero.engine.optimizer import ShardOptimizer
from megazero.engine.timers import Timers
from megazero.engine.update import StepResult
from megazero.parallel.collectives import gather_objects
from megazero.parallel.topology import Topology
from megazero.zero.zero import Zero

UNEVEN = 1.01
"""Largest ratio of bytes between ranks that is not warned of."""


class Reporter:
    """Prints, on rank 0, a line every `every` steps (0: never), with what the configuration asks for below it."""

    def __init__(self, config: LoggingConfig, topology: Topology, timers: Timers, memory: Callable[[], dict[str, int]]):
        self.every, self.samples_per_step = 0, 0
        self._memory_wanted, self._memory = config.memory_breakdown, memory
        self._topology, self._timers, self._log = topology, timers, Log(topology.rank)
        self._restart()

    def begin(self, every: int, samples_per_step: int) -> None:
        """Print every so many steps from now on, and say what each rank holds. Collective."""
        self.every, self.samples_per_step = every, samples_per_step
        self._restart()
        self.partition()

    def _restart(self) -> None:
        self._steps, self._items, self._since = 0, 0.0, time.perf_counter()

    def stepped(self, result: StepResult, step: int, skipped: int, rates: list[float], scale: float | None) -> None:
        """Note a step; collective when it is one that prints."""
        self._steps += 1
        self._items += result.items
        if not self.every or step % self.every:
            return
        seconds = time.perf_counter() - self._since
        speed = f"{self.samples_per_step * self._steps / seconds:.4g} samples/s"
        if self._items:
            speed += f" | {self._items / seconds:.4g} tokens/s"
        parts = [
            f"step {step}",
            f"loss {result.loss:.6f}" if result.loss == result.loss else "",
            speed,
            f"lr {', '.join(f'{rate:.3e}' for rate in dict.fromkeys(rates))}" if rates else "",
            f"grad norm {result.grad_norm:.4g}",
            f"loss scale {scale:g}" if scale is not None else "",
            f"skipped {skipped}" if skipped else "",
        ]
        self._log.main(" | ".join(part for part in parts if part))
        if self._timers.enabled:
            spent = {name: ms / self._steps for name, ms in self._timers.take().items()}
            self._say("ms a step, slowest rank", {k: f"{v:.1f}" for k, v in self._most(spent).items()})
        if self._memory_wanted:
            held = self._memory()
            held["activations and other"] = max(memory_bytes(self._timers.device) - sum(held.values()), 0)
            self._say("memory, fullest rank", {k: size(v) for k, v in self._most(held).items()})
        self._restart()

    def partition(self) -> None:
        """Say once what each rank holds, and warn when ranks differ. Collective."""
        held = gather_objects(sum(self._memory().values()), self._topology.group("world"))
        ratio = max(held) / max(min(held), 1)
        self._log.main(
            f"training state: {size(max(held))} on the fullest of {len(held)} rank{'s' * (len(held) != 1)}, max/min "
            f"{ratio:.3f}"
        )
        if ratio > UNEVEN and self._topology.size("pp") == 1 and self._topology.rank == 0:
            self._log.warn(
                f"ranks hold between {size(min(held))} and {size(max(held))}: more than {UNEVEN:g} apart. Smaller "
                "buckets (reduce_bucket_size, --ddp-bucket-size) have more padding; larger ones less."
            )

    def _most(self, mine: Mapping[str, float]) -> dict[str, float]:
        """The largest value of any rank, by name."""
        every = gather_objects(dict(mine), self._topology.group("world"))
        names = dict.fromkeys(name for of_rank in every for name in of_rank)
        return {name: max(of_rank.get(name, 0) for of_rank in every) for name in names}

    def _say(self, what: str, values: Mapping[str, str]) -> None:
        self._log.main(f"  {what}: " + " | ".join(f"{name} {value}" for name, value in values.items()))


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def state_bytes(module: nn.Module, zero: Zero, shards: ShardOptimizer | None) -> dict[str, int]:
    """Bytes that this rank holds in memory between steps, by component."""
    found: dict[str, int] = {}
    in_buckets = {place.parameter for bucket in [*zero.buckets, *zero.frozen] for place in bucket.placed}
    for bucket in [*zero.buckets, *zero.frozen]:
        for component, count in bucket.component_bytes().items():
            found[component] = found.get(component, 0) + count
    outside = [p for p in module.parameters() if p not in in_buckets]
    found["weights"] = found.get("weights", 0) + sum(p.nbytes for p in outside)
    found["buffers"] = sum(buffer.nbytes for buffer in module.buffers())
    if shards is not None and shards.optimizer is not None:
        states = [v for state in shards.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        found["optimizer state"] = sum(tensor.nbytes for tensor in states)
    return {component: count for component, count in found.items() if count}
