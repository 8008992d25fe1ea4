"""ds_config.json: DeepSpeed's configuration, read into the one schema.

    source ─ read_deepspeed ─► DeepSpeedConfig (settings, what is "auto", report)
           ─ resolve_deepspeed, with ranks and the model's size ─► RunConfig, optimizer, scheduler, report

Every key is used, translated, or ignored with a reason (`deepspeed_keys.py` is the table); an unknown one is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megazero.base.errors import ConfigError
from megazero.config.deepspeed_auto import Settled, settle
from megazero.config.deepspeed_optimizers import Named, read_named
from megazero.config.deepspeed_reading import read_keys
from megazero.config.deepspeed_report import KeyReport
from megazero.config.deepspeed_source import Source, read_tree
from megazero.config.deepspeed_translate import Options, translate
from megazero.config.facts import ModelFacts
from megazero.config.layers import Layer, Setting, with_settings
from megazero.config.schema import RunConfig

__all__ = [
    "DeepSpeedConfig",
    "KeyReport",
    "ModelFacts",
    "Named",
    "Options",
    "ResolvedDeepSpeed",
    "read_deepspeed",
    "resolve_deepspeed",
]

READ_AFTER_STEP = Setting(False, "derived: a script may read or change any parameter after step()")
"""DeepSpeed's step() ends with the parameters in place."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A ds_config that has been read: what it says, before ranks and model are known."""

    label: str
    """The file's name, or `config`."""
    settings: Layer
    """Recipe key -> setting, its origin being `ds_config.json zero_optimization.stage`."""
    autos: dict[str, tuple[str, ...]]
    """Path of each "auto" -> the recipe keys that it leaves open; none for parameters of optimizer and scheduler."""
    optimizer: Named | None
    """The optimizer section; "auto" is still in it."""
    scheduler: Named | None
    """The scheduler section; "auto" is still in it."""
    options: Options
    """What is no setting of a run: monitors, the data loader, a PipelineModule's options."""
    report: KeyReport
    """What became of each key, "auto" aside."""

    @property
    def monitors(self) -> dict[str, dict[str, str]]:
        """tensorboard, wandb and csv_monitor, those that are enabled -> their options."""
        return self.options.monitors


def read_deepspeed(source: Source | DeepSpeedConfig) -> DeepSpeedConfig:
    """Read a ds_config: the path of a JSON file, a dict, or base64 text.

    Raises ConfigError with every problem at once: unknown keys with the nearest match, values of a wrong type or out
    of range, keys that contradict each other, and features that are not here, each with a remedy.
    """
    if isinstance(source, DeepSpeedConfig):
        return source
    tree, label = read_tree(source)
    reading = read_keys(tree, label)
    options = translate(reading)
    optimizer, scheduler = read_named(reading, "optimizer"), read_named(reading, "scheduler")
    if reading.problems:
        raise ConfigError(*reading.problems)
    return DeepSpeedConfig(label, reading.settings, reading.autos, optimizer, scheduler, options, reading.report())


@dataclass(frozen=True)
class ResolvedDeepSpeed:
    """A ds_config for a known number of ranks and a known model: nothing is "auto" but a precision that the device
    decides."""

    config: RunConfig
    """The engine's settings; those of model, data and length are the schema's defaults."""
    optimizer: Named | None
    scheduler: Named | None
    gradient_accumulation_steps: int
    options: Options
    report: KeyReport


def resolve_deepspeed(
    ds: DeepSpeedConfig,
    *,
    data_parallel_size: int,
    model: ModelFacts | None,
    total_steps: int | None = None,
) -> ResolvedDeepSpeed:
    """Settle what a ds_config leaves open, by DeepSpeed's rules and Hugging Face's for "auto".

    Args:
        data_parallel_size: ranks over which a batch is divided.
        model: sizes for "auto" buckets: h², 0.9h² and 10h elements; None when there is no model yet.
        total_steps: optimizer steps of the training, for "auto" in the scheduler.

    Raises ConfigError with every problem: a batch that does not fit (with the values that would), settings that
    exclude each other.
    """
    settled: Settled = settle(ds.label, ds.settings, ds.autos, data_parallel_size, model, ds.options.auto_precision)
    optimizer, scheduler, lines, problems = settled.named(ds.optimizer, ds.scheduler, total_steps)
    if settled.problems or problems:
        raise ConfigError(*settled.problems, *[f"{ds.label}: {problem}" for problem in problems])
    steps = settled.config.training.gradient_accumulation_steps
    assert steps is not None
    report = ds.report.with_translated([*settled.lines, *lines]).with_ignored(settled.ignored)
    report = replace(report, assumed=tuple(settled.assumed))
    config = with_settings(settled.config, {"parallel.overlap_param_gather": READ_AFTER_STEP})
    return ResolvedDeepSpeed(config, optimizer, scheduler, steps, ds.options, report)
