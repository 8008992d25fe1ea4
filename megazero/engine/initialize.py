"""`megazero.initialize()`: a module, and what a script has beside it, to an engine. DeepSpeed's call.

configuration ─► ranks, Topology ─► "auto", batch ─► each rank its experts ─► equal values on ranks with the same
parameters ─► optimizer ─► Engine ─► scheduler
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megazero.base.errors import ConfigError
from megazero.base.log import Log
from megazero.config.deepspeed import DeepSpeedConfig, ModelFacts, Named, Options, read_deepspeed, resolve_deepspeed
from megazero.config.deepspeed_source import read_tree
from megazero.config.layers import Setting, with_settings
from megazero.config.schema import OptimizerConfig, RunConfig
from megazero.engine.distributed import join
from megazero.engine.engine import Engine
from megazero.engine.experts import expert_parallel_size, spread_experts
from megazero.engine.foreign import shard_foreign
from megazero.engine.given import OptimizerSource, make_client_optimizer, make_client_scheduler
from megazero.engine.loader import Loader
from megazero.engine.lr import LearningRate
from megazero.engine.monitors import Monitors
from megazero.engine.mpu import give_specs, topology_of
from megazero.engine.precision import DTYPES
from megazero.engine.prepare import check_real, check_rewritten, check_split, equalize, move_buffers, tell_narrowed
from megazero.engine.schedulers import course_of
from megazero.engine.units import units_of
from megazero.parallel.pipeline_module import PipelineModule
from megazero.parallel.topology import Topology
from megazero.zero.release import release_model

Source = str | os.PathLike[str] | Mapping[str, Any] | DeepSpeedConfig | RunConfig
Initialized = tuple[Engine, Any, Any, Any]


@dataclass(frozen=True)
class Settings:
    """What the configuration comes to, for known ranks and a known module."""

    config: RunConfig
    optimizer: Named | OptimizerConfig | None
    scheduler: Named | LearningRate | None
    options: Options
    report: str | None


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: OptimizerSource = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Source | None = None,
    mesh_param: Any = None,
    config_params: Source | None = None,
) -> Initialized:
    """Make an engine of any module: (engine, optimizer, dataloader, lr_scheduler). Collective over all ranks.

    Runs as a plain process, or under a launcher (torchrun), whose process group it joins.

    Args:
        args: a namespace with `deepspeed_config`, the path of a configuration, in place of `config`.
        model: any nn.Module (Hugging Face models too), or a PipelineModule. Ranks of one ZeRO group start from its
            first one's values. One that an engine holds is taken from it, with its last weights: that engine is of no
            more use.
        optimizer: a torch optimizer over the model's parameters, or a function that makes one of them; by default the
            configuration's. Without either nothing is trained.
        model_parameters: parameters or groups for the optimizer; by default all that need a gradient.
        training_data: a dataset, for the third result and for train_batch().
        lr_scheduler: a scheduler of the optimizer, or a function that makes one of it; by default the configuration's.
        mpu: Megatron's object that knows the parallel groups.
        collate_fn: makes a batch of a list of samples.
        config: a ds_config.json (path, mapping or base64 text), or a RunConfig, whose section `optimizer` counts with
            its learning-rate course where no optimizer is given. `config_params` is its old name.
        distributed_port, dist_init_required: DeepSpeed's; the launcher's address is used, and the process group is
            joined where there is one to join. mesh_param: see `topology` in PipelineModule; here it is an error.

    Raises ConfigError for what is missing or contradicts itself, with every problem at once.
    """
    if model is None:
        raise ConfigError("initialize() needs model=…, the module to train.")
    given = _given(args, config, config_params, mesh_param)
    source = given if isinstance(given, RunConfig) else read_deepspeed(given)
    check_real(model)
    _, device = join()
    log = Log(dist.get_rank() if dist.is_initialized() else 0)
    topology = _topology(model, mpu, source, device)
    settings = _settle(
        source, topology, model, device, own_optimizer=optimizer is not None, own_scheduler=lr_scheduler is not None
    )
    if settings.report:
        log.main(settings.report)
    release_model(model, "initialize() of its module")
    _apply_pipeline_options(model, settings.options, log)
    gone = spread_experts(model, topology, device, every_layer=_size(source, "expert_model_parallel_size") > 1)
    model = _prepared(model, topology, mpu, device, settings.config, log)
    named = settings.optimizer if isinstance(settings.optimizer, Named) else None
    made: Any = make_client_optimizer(model, optimizer, model_parameters, named, log.main, gone)
    if made is None and isinstance(settings.optimizer, OptimizerConfig):
        made = settings.optimizer
    engine = Engine(model, topology, settings.config, device, units_of(model), optimizer=made)
    inner = None if engine.shards is None else engine.shards.optimizer
    engine.lr_scheduler = make_client_scheduler(inner, lr_scheduler, settings.scheduler, log.main)
    engine.source = None if isinstance(given, RunConfig | DeepSpeedConfig) else read_tree(given)[0]
    if training_data is not None:
        engine.feed.set_loader(_loader(training_data, engine, settings, collate_fn))
    engine.monitors = Monitors(settings.options.monitors, log)
    engine.reporter.begin(settings.options.steps_per_print or 0, engine.train_batch_size())
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _prepared(
    model: nn.Module, topology: Topology, mpu: Any, device: torch.device, config: RunConfig, log: Log
) -> nn.Module:
    """The module split over tp if it is to be, with equal values on all ranks of a ZeRO group and buffers in place."""
    dtype = DTYPES[config.training.precision]
    check_rewritten(model, topology, dtype)
    tell_narrowed(model, dtype, log.main)
    if mpu is not None:
        give_specs(model, topology)
    else:
        model = shard_foreign(model, topology, device)
    equalize(model, topology, device)
    move_buffers(model, device, dtype)
    return model


def _given(args: Any, config: Source | None, config_params: Source | None, mesh_param: Any) -> Source:
    """The one configuration that was given. Raises ConfigError for none, or for several, and for a mesh."""
    if mesh_param is not None:
        raise ConfigError(
            f"mesh_param={mesh_param!r}: a mesh for DeepSpeed's sequence parallelism, which megazero has not got for "
            "modules from elsewhere. Leave it out."
        )
    named = {
        "args.deepspeed_config": getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None),
        "config": config,
        "config_params": config_params,
    }
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"initialize() got a configuration {len(given)} times: {', '.join(given)}. Give one of them.")
    if not given:
        raise ConfigError(
            "initialize() needs a configuration: config= the path of a ds_config.json, a dict or a RunConfig, or an "
            'args with deepspeed_config. The shortest is {"train_micro_batch_size_per_gpu": 1}.'
        )
    return next(iter(given.values()))


def _topology(model: nn.Module, mpu: Any, source: RunConfig | DeepSpeedConfig, device: torch.device) -> Topology:
    """The axes that the model and the configuration ask for. Raises ConfigError for sizes that do not fit."""
    tp = 1 if mpu is not None or isinstance(model, PipelineModule) else _size(source, "tensor_model_parallel_size")
    others = {"an mpu": mpu is not None, "a PipelineModule": isinstance(model, PipelineModule), f"tp_size={tp}": tp > 1}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    listed = [name for name, there in others.items() if there]
    ep = expert_parallel_size(model, _size(source, "expert_model_parallel_size"), ranks, listed)
    if isinstance(model, PipelineModule):
        return model.topology
    if mpu is not None:
        return topology_of(mpu)
    topology = Topology.build(tp=tp, ep=ep, device_type=device.type)
    check_split(model, topology)
    return topology


def _size(source: RunConfig | DeepSpeedConfig, axis: str) -> int:
    """What a configuration says of one axis, a field of ParallelConfig; 1: nothing."""
    if isinstance(source, RunConfig):
        return int(getattr(source.parallel, axis))
    setting = source.settings.get(f"parallel.{axis}")
    return int(setting.value) if setting is not None else 1


def _settle(
    source: RunConfig | DeepSpeedConfig,
    topology: Topology,
    model: nn.Module,
    device: torch.device,
    *,
    own_optimizer: bool = False,
    own_scheduler: bool = False,
) -> Settings:
    """The configuration for these ranks and this model, with the precision that "auto" means here. `own_scheduler`: the
    script has one, so that what the configuration says of its own need not be complete; a RunConfig's learning-rate
    course goes with its optimizer."""
    replicas = topology.size("dp")
    if isinstance(source, RunConfig):
        options = Options(steps_per_print=source.logging.log_interval)
        course = None if own_optimizer or own_scheduler else course_of(source)
        return Settings(_as_it_is(source, topology, device), source.optimizer, course, options, None)
    left = replace(source, scheduler=None) if own_scheduler else source
    found = resolve_deepspeed(left, data_parallel_size=replicas, model=facts_of(model))
    config = _as_it_is(found.config, topology, device, found.options.auto_precision)
    scheduler = source.scheduler if own_scheduler else found.scheduler
    return Settings(config, found.optimizer, scheduler, found.options, found.report.text())


def _as_it_is(config: RunConfig, topology: Topology, device: torch.device, on_gpu: str = "bf16") -> RunConfig:
    """With what "auto" precision means on the device, and the expert parallelism that the model's layers ask for."""
    found = {}
    if config.training.precision == "auto":
        precision = on_gpu if device.type == "cuda" else "fp32"
        found["training.precision"] = Setting(precision, f"derived: auto on {device.type}")
    if config.parallel.expert_model_parallel_size != topology.ep:
        found["parallel.expert_model_parallel_size"] = Setting(topology.ep, "derived: ep_size of the model's layers")
    return with_settings(config, found) if found else config


def facts_of(model: nn.Module) -> ModelFacts:
    """The sizes that "auto" is made of."""
    units = units_of(model)
    modules = dict(model.named_modules())
    sizes = [sum(p.numel() for p in modules[name].parameters()) for name in units if name in modules]
    total = sum(p.numel() for p in model.parameters())
    return ModelFacts(total, _hidden_size(getattr(model, "config", None)), max(sizes, default=total))


def _hidden_size(config: Any) -> int | None:
    """Where Hugging Face configurations say it."""
    for holder in (config, getattr(config, "text_config", None)):
        for name in ("hidden_size", "hidden_sizes", "d_model", "n_embd"):
            value = getattr(holder, name, None)
            if isinstance(value, list | tuple) and value:
                value = max(value)
            if isinstance(value, int):
                return value
    return None


def _apply_pipeline_options(model: nn.Module, options: Options, log: Log) -> None:
    """What the section `pipeline` says to a PipelineModule, which is built already. Collective."""
    if not isinstance(model, PipelineModule):
        return
    if options.activation_checkpoint_interval is not None:
        model.set_activation_checkpoint_interval(options.activation_checkpoint_interval)
    if options.seed_layers and not model.seed_layers and not model.reseed():
        log.main(
            "pipeline.seed_layers comes too late: the PipelineModule's values are no longer those that it was built "
            "with, and are kept. Pass seed_layers=True there."
        )


def _loader(data: Any, engine: Engine, settings: Settings, collate_fn: Callable[[list[Any]], Any] | None) -> Loader:
    return Loader(
        data,
        engine.topology.group("dp"),
        micro_batch_size=engine.train_micro_batch_size_per_gpu(),
        seed=settings.config.training.seed,
        collate_fn=collate_fn,
        drop_last=settings.options.dataloader_drop_last or engine.topology.size("pp") > 1,
        pin_memory=engine.device.type == "cuda",
    )
