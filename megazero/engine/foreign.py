"""Tensor parallelism for modules that know nothing of it: the one place where it enters."""

from __future__ import annotations

from torch import nn

from megazero.base.errors import ConfigError
from megazero.parallel.topology import Topology


def shard_foreign(module: nn.Module, topology: Topology) -> nn.Module:
    """The module with its matrices split over `topology`'s tp axis; itself where that has one rank.

    Raises ConfigError for several: modules from elsewhere are not split yet.
    """
    ranks = topology.size("tp")
    if ranks > 1 and not any(hasattr(parameter, "shard_spec") for parameter in module.parameters()):
        raise ConfigError(
            f"tensor_parallel.tp_size {ranks} with a {type(module).__name__}: modules from elsewhere are not split over "
            "ranks. Use tp_size 1 with ZeRO stage 3, a model of megazero.models (pretrain_gpt.py), or an mpu with layers "
            "that are split already."
        )
    return module
