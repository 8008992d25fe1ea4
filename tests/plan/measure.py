"""What the real model does on a fake topology, in this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megazero.config.schema import RunConfig
from megazero.config.validate import resolve
from megazero.data.batch import Batch
from megazero.engine.engine import DTYPES
from megazero.models.gpt import GPT
from megazero.parallel.recompute import Recompute
from megazero.parallel.topology import Topology
from megazero.train.build import Forward
from tests.config.settings import config_with

SIZES: dict[str, Any] = {
    "model__num_layers": 4,
    "model__hidden_size": 64,
    "model__num_query_groups": 4,
    "model__vocab_size": 500,
    "data__seq_length": 64,
    "training__micro_batch_size": 2,
    "training__precision": "bf16",
}


def configuration(world: int, **changes: Any) -> RunConfig:
    """A small model, resolved for `world` ranks."""
    return resolve(config_with(**(SIZES | changes)), world)


@contextmanager
def fake(config: RunConfig, world: int, rank: int = 0) -> Iterator[Topology]:
    """The topology that the configuration asks for, without other processes."""
    if world == 1:
        yield Topology.single()
        return
    parallel = config.parallel
    try:
        yield Topology.fake(
            world,
            rank,
            pp=parallel.pipeline_model_parallel_size,
            cp=parallel.context_parallel_size,
            tp=parallel.tensor_model_parallel_size,
            sequence_parallel=bool(parallel.sequence_parallel),
            cp_comm=parallel.cp_comm_type,
        )
    finally:
        dist.destroy_process_group()


def batch(config: RunConfig) -> Batch:
    """One micro-batch of zeros, the part of it that one cp rank gets."""
    rows, length = config.training.micro_batch_size, config.data.seq_length // config.parallel.context_parallel_size
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    places = torch.arange(length).expand(rows, length)
    return Batch(tokens, tokens, torch.ones(rows, length), places, None, torch.arange(rows))


class _Storages(TorchDispatchMode):
    """Notes the memory of every tensor that an operation makes."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.made = known, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                memory = tensor.untyped_storage()
                if memory._cdata not in self.known and memory._cdata not in self.made:
                    self.made[memory._cdata] = (StorageWeakRef(memory), memory.nbytes())
        return result


def kept_bytes(config: RunConfig, world: int) -> int:
    """Bytes alive after a micro-batch's forward through the whole model, parameters and inputs aside."""
    with fake(config, world) as topology:
        model: nn.Module = GPT(config.model, topology, recompute=Recompute.of(config, topology))
        model = model.to_empty(device="cpu").to(DTYPES[config.training.precision])
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        forward, inputs = Forward(config, topology, torch.device("cpu")), batch(config)
        with _Storages({parameter.untyped_storage()._cdata for parameter in model.parameters()}) as storages:
            loss = forward.loss_sum(model, inputs)
        gc.collect()
        alive = [size for memory, size in storages.made.values() if not memory.expired()]
        assert loss.requires_grad
        return sum(alive)
