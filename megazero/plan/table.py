"""A plan in words: the run, the machines, one line for each row of a rung."""

from __future__ import annotations

from collections.abc import Sequence

from megazero.config.schema import RunConfig
from megazero.plan.ladder import Machines, Row
from megazero.plan.memory import WEIGHT_BYTES, gradient_bytes
from megazero.plan.model_size import ModelSize
from megazero.plan.parameters import BUCKET_ELEMENTS

_COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("weights", ("weights", "16-bit copies")),
    ("grads", ("gradients",)),
    ("master", ("master weights",)),
    ("moments", ("optimizer state",)),
    ("buckets", ("gradient buckets", "reduction buffers", "update buffers", "gathered weights")),
    ("activ.", ("activations", "working memory")),
)
"""Heading, the components of a device under it."""
_GIB = 2**30
_NOTES = """  GiB on one device, by component; CPU, NVMe: GiB on one machine. moving: estimated time a step for what is
  communicated and offloaded, nothing overlapped, at the rates of megazero/plan/cost.py."""


def table(rows: Sequence[Row], own: Row | None, best: Row | None) -> list[str]:
    """GiB by component; `>` marks the row that was asked about, `*` the recommended one."""
    heads = "".join(f"{name:>8}" for name, _ in _COLUMNS)
    lines = [f"   ZeRO optimizer weights {heads}{'device':>9}{'CPU':>7}{'NVMe':>7}{'moving':>9}"]
    for row in rows:
        stage, optimizer, param = row.choice
        marks = (">" if row is own else " ") + ("*" if row is best else " ")
        cells = [sum(row.homes.device.get(name, 0.0) for name in names) / _GIB for _, names in _COLUMNS]
        lines.append(
            f"{marks} {stage:^4} {_HOMES[optimizer]:<9} {_HOMES[param]:<8}"
            + "".join(f"{cell:>8,.1f}" if cell else f"{'-':>8}" for cell in cells)
            + f"{row.device / _GIB:>9,.1f}"
            + "".join(f"{size / _GIB:>7,.0f}" if size else f"{'-':>7}" for size in (row.cpu, row.nvme))
            + f"{seconds(row.seconds.moving):>9}{'' if row.fits else '  too much'}"
        )
    marked = [word for word, row in (("> the ds_config", own), ("* recommended", best)) if row is not None]
    return [*lines, f"{_NOTES}{' ' * bool(marked)}{', '.join(marked)}"]


_HOMES = {"none": "device", "cpu": "CPU", "nvme": "NVMe"}


def seconds(count: float) -> str:
    """`0.14 s`, `32 s`."""
    return f"{count:,.0f} s" if count >= 10 else f"{count:.2g} s"


def name_of(row: Row) -> str:
    """`ZeRO 3, optimizer and weights in CPU memory`."""
    stage, optimizer, param = row.choice
    places = {"cpu": "on the CPU", "nvme": "on NVMe"}
    if optimizer == param != "none":
        return f"ZeRO {stage}, optimizer and weights {places[optimizer]}"
    words = [f"ZeRO {stage}"]
    if optimizer != "none":
        words.append(f"optimizer {places[optimizer]}")
    if param != "none":
        words.append(f"weights {places[param]}")
    return ", ".join(words)


def describe_run(size: ModelSize, count: int, config: RunConfig, optimizer: str) -> list[str]:
    """Model, batch, precision, the optimizer as its user calls it, and the buckets in bytes."""
    model, training, parallel = config.model, config.training, config.parallel
    assumed = "taken as " if size.given is not None else ""
    kept = "fp32" if gradient_bytes(config) == 4 else "16-bit"
    again = ", activation checkpointing" if config.recompute.recompute_granularity == "full" else ""
    return [
        f"model     {size.name}: {count:,} parameters, {assumed}{model.num_layers} layers of {model.hidden_size:,}",
        f"step      {training.gradient_accumulation_steps or 1} × {training.micro_batch_size} × "
        f"{config.data.seq_length:,} tokens a rank (accumulation × micro-batch × sequence); "
        f"{training.precision} weights, {kept} gradients, {optimizer}{again}",
        *_buckets(parallel.ddp_bucket_size, parallel.stage3_prefetch_bucket_size, config),
    ]


def _buckets(reduce: int | None, prefetch: int | None, config: RunConfig) -> list[str]:
    """Sizes are set in elements; this says bytes."""
    elements = reduce or BUCKET_ELEMENTS
    words = [f"gradients {elements:,} elements = {_bytes(elements * gradient_bytes(config))}"]
    if prefetch:
        weight = WEIGHT_BYTES[config.training.precision]
        words.append(f"weights fetched ahead {prefetch:,} elements = {_bytes(prefetch * weight)}")
    return [f"buckets   {'; '.join(words)}"]


def describe_machines(machines: Machines) -> list[str]:
    """What there is to fit into."""
    number = machines.world_size // machines.ranks
    cpu = "CPU memory not checked (--cpu-memory)"
    if machines.cpu_memory is not None:
        cpu = f"{machines.cpu_memory / _GIB:,.0f} GiB of CPU memory on a machine"
    return [
        f"devices   {machines.world_size}, {machines.ranks} on each of {number} machine{'s' * (number > 1)}; "
        f"{machines.device_memory / _GIB:,.1f} GiB each; {cpu}"
    ]


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
