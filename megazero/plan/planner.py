"""`megazero plan`: the ladder as a table, which row a ds_config.json is, and the fastest row that fits. No torch.

    megazero plan [ds_config.json] --model llama3-8b --world-size 8 --device-memory 80GiB

Exit status: 0 when the ds_config's row fits (without one: when any does), 1 when not, 2 for what cannot work.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megazero.base.errors import ConfigError
from megazero.config.deepspeed import DeepSpeedConfig, ResolvedDeepSpeed, read_deepspeed, resolve_deepspeed
from megazero.config.deepspeed_source import read_tree
from megazero.config.facts import ModelFacts
from megazero.config.layers import Setting, assemble, with_settings
from megazero.config.layout import parse_bytes
from megazero.config.recompute_rules import nothing_to_partition
from megazero.config.schema import RunConfig
from megazero.config.validate import resolve
from megazero.plan.cut import cut_layers
from megazero.plan.flops import parameter_count
from megazero.plan.ladder import Machines, Row, Rung, gentler, recommended, walk
from megazero.plan.model_size import ModelSize, model_size
from megazero.plan.optimizer_state import optimizer_settings, uncounted
from megazero.plan.parameters import parameters
from megazero.plan.recommendation import as_lines, ds_config_of, flags_of
from megazero.plan.table import describe_machines, describe_run, name_of, seconds, table

_SEQUENCE = 4096
"""Tokens without --seq-length, or the model's longest if that is less."""


def plan(words: Sequence[str]) -> int:
    """Print the plan that the words after `megazero plan` ask for; the exit status.

    Raises ConfigError for words, models, configurations and layouts that cannot work.
    """
    asked = _parser().parse_args(list(words))
    machines = _machines(asked)
    size = model_size(asked.model)
    ds = read_deepspeed(asked.ds_config) if asked.ds_config else None
    config, count = configuration(size, ds, asked, machines)
    tp = config.parallel.tensor_model_parallel_size
    rungs = list(walk(config, machines, None if size.given is None and not size.extra else count // tp))
    own = next((row for row in rungs[0].rows if row.config == config), None) if ds else None
    found = recommended(rungs)
    named = ds.optimizer if ds is not None else None
    optimizer = config.optimizer.optimizer if named is None else f"{named.type}{uncounted(named)}"
    print("\n".join([*describe_run(size, count, config, optimizer), *describe_machines(machines), ""]))
    shown = found[1] if found and found[0] is rungs[0] else None
    print("\n".join([*table(rungs[0].rows, own, shown), ""]))
    if own is not None and ds is not None:
        print(_verdict(ds.label, own))
    given = read_tree(asked.ds_config)[0] if asked.ds_config else None
    print("\n".join(_advice(rungs, found, own, given)))
    return int(not own.fits if own is not None else found is None)


def configuration(
    size: ModelSize, ds: DeepSpeedConfig | None, asked: argparse.Namespace, machines: Machines
) -> tuple[RunConfig, int]:
    """The resolved settings of the run to plan, and its number of parameters."""
    longest = size.values.get("max_position_embeddings") or _SEQUENCE
    length = asked.seq_length or min(_SEQUENCE, longest)
    own: dict[str, Setting] = {
        f"model.{key}": Setting(value, f"model {size.name}") for key, value in size.values.items()
    }
    own |= {"data.seq_length": Setting(length, "flag --seq-length"), "data.mock_data": Setting(True, "plan")}
    own |= {"training.train_iters": Setting(1, "plan")}
    if (size.values.get("max_position_embeddings") or length) < length:
        own["model.max_position_embeddings"] = Setting(length, "flag --seq-length")
    if ds is None:
        own |= {
            "training.micro_batch_size": Setting(asked.micro_batch_size or 1, "flag --micro-batch-size"),
            "training.precision": Setting("bf16", "plan"),
        }
        config = resolve(assemble([own]), machines.world_size)
    else:
        config = _with_deepspeed(ds, own, size, asked, machines)
    if config.parallel.pipeline_model_parallel_size > 1:
        raise ConfigError("a pipeline has other bytes on each rank: plan it with pretrain_gpt.py --dry-run.")
    return config, size.given or parameter_count(config.model) + size.extra


def _with_deepspeed(
    ds: DeepSpeedConfig, own: dict[str, Setting], size: ModelSize, asked: argparse.Namespace, machines: Machines
) -> RunConfig:
    """The ds_config's settings for this model; --micro-batch-size fills in what it leaves open."""
    settings = dict(ds.settings)
    micro = settings.get("training.micro_batch_size")
    if asked.micro_batch_size:
        if micro is not None and micro.value != asked.micro_batch_size:
            raise ConfigError(
                f"--micro-batch-size {asked.micro_batch_size}, and {micro.origin} is {micro.value}. Change one of them."
            )
        settings["training.micro_batch_size"] = Setting(asked.micro_batch_size, "flag --micro-batch-size")
    tp = settings.get("parallel.tensor_model_parallel_size", Setting(1, "default")).value
    bare = resolve(assemble([own]), 1)
    listed = parameters(bare, cut_layers(bare))
    units: dict[str, int] = {}
    for parameter in listed:
        units[parameter.unit] = units.get(parameter.unit, 0) + parameter.elements
    count = size.given or parameter_count(bare.model) + size.extra
    facts = ModelFacts(count, bare.model.hidden_size, max(units.values()))
    if machines.world_size % tp:
        raise ConfigError(f"--world-size {machines.world_size} is no multiple of tensor parallelism's {tp} ranks.")
    opened = dataclasses.replace(ds, settings=settings, scheduler=None)
    resolved = resolve_deepspeed(opened, data_parallel_size=machines.world_size // tp, model=facts)
    return resolve(with_settings(resolved.config, own | _planned(resolved)), machines.world_size)


def _planned(resolved: ResolvedDeepSpeed) -> dict[str, Setting]:
    """What a plan takes otherwise than the file: auto as on a GPU, parts of activations where there are any."""
    config = resolved.config
    found = {} if resolved.optimizer is None else optimizer_settings(resolved.optimizer)
    if config.training.precision == "auto":
        found["training.precision"] = Setting(resolved.options.auto_precision, "auto on a GPU")
    if config.recompute.partition_activations and nothing_to_partition(config.parallel):
        found["recompute.partition_activations"] = Setting(False, "nothing to divide")
    return found


def _machines(asked: argparse.Namespace) -> Machines:
    for name in ("world_size", "gpus_per_node", "seq_length", "micro_batch_size"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1.")
    ranks = asked.gpus_per_node or min(asked.world_size, 8)
    if asked.world_size % ranks:
        raise ConfigError(
            f"--world-size {asked.world_size} is no multiple of the {ranks} ranks on a machine. Give --gpus-per-node."
        )
    try:
        cpu = parse_bytes(asked.cpu_memory) if asked.cpu_memory else None
    except ConfigError as error:
        raise ConfigError(str(error).replace("--device-memory", "--cpu-memory")) from None
    return Machines(asked.world_size, ranks, parse_bytes(asked.device_memory), cpu)


def _verdict(label: str, own: Row) -> str:
    """Whether the configuration that was given fits."""
    head = f"{label} is {name_of(own)} (the row marked >)"
    if own.fits:
        return f"{head}: fits, {own.device / 2**30:,.1f} GiB a device"
    over = []
    if own.device > own.machines.device_memory:
        over.append(f"{(own.device - own.machines.device_memory) / 2**30:,.1f} GiB over a device's memory")
    if own.machines.cpu_memory is not None and own.cpu > own.machines.cpu_memory:
        over.append(f"{(own.cpu - own.machines.cpu_memory) / 2**30:,.1f} GiB over a machine's CPU memory")
    return f"{head}: does not fit, {' and '.join(over)}"


def _advice(
    rungs: list[Rung], found: tuple[Rung, Row] | None, own: Row | None, given: Mapping[str, Any] | None
) -> list[str]:
    """The recommendation, after the rungs that did not help: as flags for who has no ds_config, and as a ds_config."""
    lines = []
    last = found[0] if found else None
    for rung in rungs:
        if rung is last or rung.fastest is not None:
            break
        least = rung.smallest
        lines.append(
            f"{'with ' + rung.changes if rung.changes else 'as it is'}: nothing fits; the least is "
            f"{least.device / 2**30:,.1f} GiB, {name_of(least)}"
        )
    if found is None:
        return [*lines, "nothing fits: use more or larger devices, more CPU memory, or tensor parallelism"]
    rung, row = found
    if row is own:
        lines.append("it is the fastest that fits")
    else:
        lines += [f"fastest that fits: {_words(rung, row)}", *_written(row, rungs[0].rows[0].config, given)]
    other = gentler(rungs, found)
    if other is not None:
        lines.append(f"faster with smaller portions: {_words(*other)}")
    return [*lines, *_tight(row)]


def _written(row: Row, asked: RunConfig, given: Mapping[str, Any] | None) -> list[str]:
    lines = [f"  {flags_of(row, asked)}"] if given is None else []
    lines += [f"  {line}" for line in as_lines(ds_config_of(row, asked, given))]
    if row.config.data.seq_length != asked.data.seq_length and given is not None:
        lines.append(f"  --seq-length {row.config.data.seq_length}")
    if row.config.recompute.recompute_granularity == "full":
        lines.append(
            "  (a module of your own recomputes where it says so: gradient_checkpointing_enable(), for instance)"
        )
    return lines


def _words(rung: Rung, row: Row) -> str:
    changes = f" with {rung.changes}" if rung.changes else ""
    again = f" and {seconds(row.seconds.again)} of recomputation" if row.seconds.again else ""
    return (
        f"{name_of(row)}{changes}\n  {row.device / 2**30:,.1f} GiB a device, about {seconds(row.seconds.moving)} of "
        f"transfers{again} a step"
    )


def _tight(row: Row) -> list[str]:
    """What the formulas do not see: the driver's own memory, fragmentation."""
    if not row.is_tight:
        return []
    share = row.device / row.machines.device_memory
    return [f"  that is {share:.0%} of the device; the driver and fragmentation take a few GiB too"]


class _Parser(argparse.ArgumentParser):
    """argparse, except that an error is raised instead of printed with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} (megazero plan --help says more).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="megazero plan",
        description="Bytes on a rank of every ZeRO stage and offload, and the fastest choice that fits.",
        allow_abbrev=False,
    )

    def add(name: str, text: str, **shape: Any) -> None:
        parser.add_argument(name, help=text, **shape)

    parser.add_argument("ds_config", nargs="?", help="a ds_config.json: which row it is, and whether that fits")
    add("--model", "a preset, a folder with a Hugging Face config.json, or a number of parameters", required=True)
    add("--world-size", "ranks", type=int, required=True, metavar="N")
    add("--device-memory", "of one device (80GiB)", default="80GiB", metavar="SIZE")
    add("--cpu-memory", "of one machine; without it CPU memory is not checked", metavar="SIZE")
    add("--gpus-per-node", "ranks on one machine (8, or all)", type=int, metavar="N")
    add("--seq-length", f"tokens of a sample ({_SEQUENCE}, or the model's longest)", type=int, metavar="N")
    add("--micro-batch-size", "samples that a rank takes at a time (1)", type=int, metavar="N")
    return parser
