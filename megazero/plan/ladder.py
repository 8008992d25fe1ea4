"""The ladder that one climbs when a model does not fit, walked for the user: every ZeRO stage with every home of
optimizer and weights; then activation checkpointing, smaller micro-batches, shorter sequences.

A rung is a set of changes, a row of it one choice of stage and homes. Recommended is the row whose step spends least on
moving and recomputing (plan/cost.py) among those that fit; micro-batch and sequence are changed only when no row fits
without, as they change what is computed at a time, or what is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megazero.config.layers import Setting, with_settings
from megazero.config.schema import RunConfig
from megazero.plan.cost import Seconds, step_seconds
from megazero.plan.cut import cut_layers
from megazero.plan.memory import Homes
from megazero.plan.parameters import parameters
from megazero.plan.rank import rank_memory
from megazero.plan.schedule import Action

CHOICES: tuple[tuple[int, str, str], ...] = (
    (0, "none", "none"),
    (1, "none", "none"),
    (1, "cpu", "none"),
    (1, "nvme", "none"),
    (2, "none", "none"),
    (2, "cpu", "none"),
    (2, "nvme", "none"),
    (3, "none", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
    (3, "nvme", "none"),
    (3, "nvme", "cpu"),
    (3, "nvme", "nvme"),
)
"""(stage, home of the optimizer, home of the weights)."""
ROOM = 0.93
"""Share of a device's memory that is recommended to be used: the driver and fragmentation take a few GiB."""
SHORTEST = 512
"""Tokens: sequences are not cut below this."""


@dataclass(frozen=True)
class Machines:
    """What there is to fit into."""

    world_size: int
    ranks: int
    """On one machine."""
    device_memory: int
    cpu_memory: int | None = None
    """Of one machine; None: not known, not checked."""


@dataclass(frozen=True)
class Row:
    """One choice, its bytes on a rank, and its cost."""

    config: RunConfig
    homes: Homes
    seconds: Seconds
    machines: Machines

    @property
    def choice(self) -> tuple[int, str, str]:
        offload = self.config.offload
        return self.config.parallel.zero_stage, offload.offload_optimizer, offload.offload_param

    @property
    def device(self) -> float:
        return sum(self.homes.device.values())

    @property
    def cpu(self) -> float:
        """Of one machine."""
        return sum(self.homes.cpu.values()) * self.machines.ranks

    @property
    def nvme(self) -> float:
        """Of one machine."""
        return sum(self.homes.nvme.values()) * self.machines.ranks

    @property
    def fits(self) -> bool:
        known = self.machines.cpu_memory
        return self.device <= self.machines.device_memory and (known is None or self.cpu <= known)

    @property
    def is_tight(self) -> bool:
        return self.device > ROOM * self.machines.device_memory


@dataclass(frozen=True)
class Rung:
    """Rows under the same changes."""

    changes: str
    """In words; empty for none."""
    rows: tuple[Row, ...]

    @property
    def fastest(self) -> Row | None:
        """Of those that fit (with room to spare, if there are such) the one of the least cost; of nearly equal ones the
        one that offloads least, then the one that needs least."""
        fitting = [row for row in self.rows if row.fits]
        return _cheapest([row for row in fitting if not row.is_tight] or fitting)

    @property
    def smallest(self) -> Row:
        return min(self.rows, key=lambda row: row.device)


def _cheapest(fitting: list[Row]) -> Row | None:
    """Of one rung, in which all recompute the same. A few percent of an estimate are none."""
    least = min((row.seconds.moving for row in fitting), default=0.0)
    near = [row for row in fitting if row.seconds.moving <= 1.03 * least]
    return min(near, key=lambda row: (row.cpu + row.nvme, row.device, row.choice), default=None)


def rows(config: RunConfig, machines: Machines, elements: int | None = None) -> tuple[Row, ...]:
    """Every choice for a resolved configuration without a pipeline, and its own if it is none of them.

    Args:
        elements: parameters of a rank, when they are known better than the settings of the model tell.
    """
    offload = config.offload
    own = (config.parallel.zero_stage, offload.offload_optimizer, offload.offload_param)
    choices = CHOICES if own in CHOICES else (*CHOICES, own)
    return tuple(_row(_chosen(config, choice), machines, elements) for choice in choices)


def _row(config: RunConfig, machines: Machines, elements: int | None) -> Row:
    cut = cut_layers(config)
    homes = rank_memory(config, machines.world_size, 0, [[Action(0, "F", 0), Action(0, "B", 0)]], elements)
    seconds = step_seconds(config, cut, parameters(config, cut), homes, machines.world_size, machines.ranks)
    return Row(config, homes, seconds, machines)


def _chosen(config: RunConfig, choice: tuple[int, str, str]) -> RunConfig:
    stage, optimizer, param = choice
    values: dict[str, object] = {
        "parallel.zero_stage": stage,
        "offload.offload_optimizer": optimizer,
        "offload.offload_param": param,
    }
    return _with(config, values)


def _with(config: RunConfig, values: dict[str, object]) -> RunConfig:
    return with_settings(config, {key: Setting(value, "plan") for key, value in values.items()})


def walk(config: RunConfig, machines: Machines, elements: int | None = None) -> Iterator[Rung]:
    """The rungs in order, from no change to all."""
    yield Rung("", rows(config, machines, elements))
    words = ""
    if config.recompute.recompute_granularity != "full":
        recompute: dict[str, object] = {"granularity": "full", "method": "uniform", "num_layers": 1}
        config = _with(config, {f"recompute.recompute_{key}": value for key, value in recompute.items()})
        words = "activation checkpointing"
        yield Rung(words, rows(config, machines, elements))
    while config.training.micro_batch_size % 2 == 0:
        micro, batches = config.training.micro_batch_size // 2, config.training.gradient_accumulation_steps or 1
        values: dict[str, object] = {"micro_batch_size": micro, "gradient_accumulation_steps": 2 * batches}
        config = _with(config, {f"training.{key}": value for key, value in values.items()})
        yield Rung(_join(words, f"micro-batch size {micro}"), rows(config, machines, elements))
    words = _join(words, f"micro-batch size {config.training.micro_batch_size}")
    while config.data.seq_length // 2 >= SHORTEST:
        config = _with(config, {"data.seq_length": config.data.seq_length // 2})
        yield Rung(_join(words, f"sequences of {config.data.seq_length:,}"), rows(config, machines, elements))


def _join(*words: str) -> str:
    return ", ".join(filter(None, words))


def recommended(rungs: list[Rung]) -> tuple[Rung, Row] | None:
    """The fastest row that fits, of the rungs that change nothing or recompute; else of the first rung that has one."""
    first = rungs[0].rows[0].config
    free = [rung for rung in rungs if _shape(rung) == (first.training, first.data)]
    return cheapest(free) or next(filter(None, (cheapest([rung]) for rung in rungs)), None)


def cheapest(rungs: list[Rung]) -> tuple[Rung, Row] | None:
    """The fastest row that fits of all these rungs."""
    found = [(rung, rung.fastest) for rung in rungs]
    fitting = [(rung, row) for rung, row in found if row is not None]
    fitting = [(rung, row) for rung, row in fitting if not row.is_tight] or fitting
    return min(fitting, key=lambda pair: pair[1].seconds.total, default=None)


def gentler(rungs: list[Rung], found: tuple[Rung, Row]) -> tuple[Rung, Row] | None:
    """A row with a smaller micro-batch, if it spends at least a third less than `found`."""
    data = rungs[0].rows[0].config.data
    other = cheapest([rung for rung in rungs if rung.rows[0].config.data == data])
    return other if other is not None and other[1].seconds.total < found[1].seconds.total * 2 / 3 else None


def _shape(rung: Rung) -> tuple[object, object]:
    config = rung.rows[0].config
    return config.training, config.data
