"""From a parsed configuration to everything a run needs: launch, layout, data, model, engine.

environment ─► Launch ─► device, process group ─► resolve ─► Topology ─► datasets ─► model on meta ─► Engine
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megazero.base.device import (
    default_backend,
    device_for,
    device_type,
    initialize_distributed,
    shutdown_distributed,
)
from megazero.base.launch import Launch, cpu_threads_for
from megazero.base.log import Log
from megazero.config.layers import Setting, with_settings
from megazero.config.schema import RunConfig
from megazero.config.validate import resolve
from megazero.config.zero_rules import warnings_of
from megazero.data.build import Datasets, build_datasets
from megazero.data.tokenizer import Tokenizer, build_tokenizer
from megazero.engine.engine import Engine
from megazero.parallel.liveness import answering_roll_calls
from megazero.parallel.topology import Topology
from megazero.plan.cut import cut_layers, describe_cut
from megazero.train.build import Forward, build_engine


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    config: RunConfig
    """Resolved, with precision and backend settled."""
    launch: Launch
    topology: Topology
    device: torch.device
    tokenizer: Tokenizer | None
    datasets: Datasets
    engine: Engine
    forward: Forward
    log: Log


@contextmanager
def set_up(config: RunConfig) -> Iterator[Run]:
    """Build a run and, at the end, leave the process group. Collective over all launched ranks.

    Raises ConfigError and DataError for what the settings or the files make impossible.
    """
    launch = Launch.from_environment()
    log = Log(launch.rank)
    device = device_for(launch.local_rank, launch.local_world_size)
    tokenizer = None
    if config.data.tokenizer_model is not None:
        tokenizer = build_tokenizer(config.data, config.model.vocab_size)
        if config.model.vocab_size is None:
            config = _derived(config, "model.vocab_size", tokenizer.vocab_size, "size of the tokenizer")
    config = _settle(resolve(config, launch.world_size), device)
    for warning in warnings_of(config):
        log.main(f"warning: {warning}")
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads_for(launch.local_world_size))
    backend = config.parallel.distributed_backend or default_backend(device.type)
    initialize_distributed(launch, backend, config.parallel.distributed_timeout_minutes)
    try:
        parallel = config.parallel
        topology = Topology.build(
            pp=parallel.pipeline_model_parallel_size,
            cp=parallel.context_parallel_size,
            tp=parallel.tensor_model_parallel_size,
            ep=parallel.expert_model_parallel_size,
            sequence_parallel=bool(parallel.sequence_parallel),
            cp_comm=parallel.cp_comm_type,
            device_type=device.type,
        )
        datasets = _datasets(config, tokenizer, topology)
        engine, forward = build_engine(config, topology, device)
        if topology.size("pp") > 1:
            log.main(describe_cut(cut_layers(config)))
        with answering_roll_calls():
            yield Run(config, launch, topology, device, tokenizer, datasets, engine, forward, log)
    finally:
        shutdown_distributed()


def _settle(config: RunConfig, device: torch.device) -> RunConfig:
    """Fill in what depends on the machine, and the learning rate's length where the user gave none."""
    if config.training.precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
        config = _derived(config, "training.precision", precision, f"auto on {device_type()}")
    if config.optimizer.lr_decay_iters is None:
        config = _derived(config, "optimizer.lr_decay_iters", config.training.train_iters, "train-iters")
    if config.optimizer.lr_wsd_decay_iters is None:
        tenth = max((config.optimizer.lr_decay_iters or 1) // 10, 1)
        config = _derived(config, "optimizer.lr_wsd_decay_iters", tenth, "lr-decay-iters / 10")
    return config


def _derived(config: RunConfig, key: str, value: object, how: str) -> RunConfig:
    return with_settings(config, {key: Setting(value, f"derived: {how}")})


def _datasets(config: RunConfig, tokenizer: Tokenizer | None, topology: Topology) -> Datasets:
    training = config.training
    assert training.train_iters is not None and training.global_batch_size is not None
    batch = training.global_batch_size
    return build_datasets(
        config,
        tokenizer,
        train_samples=training.train_iters * batch,
        valid_samples=training.eval_iters * batch,
        test_samples=0,
        group=topology.group("world"),
    )
