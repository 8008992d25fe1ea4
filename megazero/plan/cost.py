"""Estimated seconds that a step spends on moving and recomputing, to put choices of ZeRO and offload in order.

    network   bytes of plan/communication.py ÷ the link between ranks
    pcie      optimizer away: gradients down (each micro-batch in stages 2, 3), updated weights up; weights away: up for
              each forward and backward
    cpu       the optimizer's step, bound by memory: reads and writes master, moments, gradient and weight
    nvme      master and moments read and written once a step; weights read for each forward and backward
    again     a second forward of what is recomputed

Nothing is taken to overlap, and the rates are those below: good for an order, not for a promise. CPU memory and NVMe
are shared by the ranks of a machine.
"""

from __future__ import annotations

from typing import NamedTuple

from megazero.config.derive import data_parallel_size
from megazero.config.schema import RunConfig
from megazero.plan.communication import communication
from megazero.plan.cut import StageCut
from megazero.plan.flops import flops_per_token
from megazero.plan.memory import WEIGHT_BYTES, Homes, gradient_bytes, state_bytes
from megazero.plan.parameters import Parameter

PCIE = 32e9
"""Bytes/s each way between a GPU and its machine's memory: PCIe 4.0 × 16."""
NVME = 7e9
"""Bytes/s of a machine's NVMe disk (PCIe 4.0 × 4)."""
CPU_MEMORY = 100e9
"""Bytes/s that one machine's optimizer step gets through its memory (eight channels of DDR4 state 200)."""
NVLINK = 300e9
"""Bytes/s each way between GPUs of one machine (A100)."""
NETWORK = 25e9
"""Bytes/s each way between machines, a 200 Gb/s adapter for each GPU."""
GPU_FLOPS = 0.4 * 312e12
"""An A100 in bf16 at a model FLOPs utilisation of 40%."""


class Seconds(NamedTuple):
    """Of one step."""

    network: float
    pcie: float
    cpu: float
    nvme: float
    again: float

    @property
    def moving(self) -> float:
        """All but recomputation."""
        return self.network + self.pcie + self.cpu + self.nvme

    @property
    def total(self) -> float:
        return self.moving + self.again


def step_seconds(
    config: RunConfig, cut: tuple[StageCut, ...], listed: list[Parameter], homes: Homes, world_size: int, machine: int
) -> Seconds:
    """Of a run without a pipeline.

    Args:
        listed, homes: a rank's parameters and bytes. machine: ranks that share a machine.
    """
    stage, offload = config.parallel.zero_stage, config.offload
    dp = data_parallel_size(config, world_size)
    group = dp * config.parallel.context_parallel_size
    batches = config.training.gradient_accumulation_steps or 1
    sent = sum(volume.bytes for volume in communication(config, cut, 0, listed, group, batches))
    shard = sum(parameter.elements for parameter in listed) / (group if stage else 1)
    weight, gradient = WEIGHT_BYTES[config.training.precision], gradient_bytes(config)
    moved = shard * offload.offload_ratio if offload.offload_optimizer != "none" else 0.0
    away = shard if offload.offload_param != "none" else 0.0
    state = 4 + state_bytes(config)
    pcie = moved * gradient * (batches if stage >= 2 else 1) + moved * weight * (not away) + away * weight * 2 * batches
    cpu = moved * (2 * state + gradient + weight)
    files = 2 * state * moved if offload.offload_optimizer == "nvme" else 0.0
    files += homes.nvme.get("weights", 0.0) * (2 * batches + 1)
    return Seconds(
        network=sent / (NVLINK if world_size <= machine else NETWORK),
        pcie=pcie / PCIE,
        cpu=cpu * machine / CPU_MEMORY,
        nvme=files * machine / NVME,
        again=_again(config, batches),
    )


def _again(config: RunConfig, batches: int) -> float:
    """Seconds of a rank's forwards that are done a second time."""
    if config.recompute.recompute_granularity != "full":
        return 0.0
    tokens = config.training.micro_batch_size * config.data.seq_length * batches
    parts = config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    return flops_per_token(config.model, config.data.seq_length) / 3 * tokens / parts / GPU_FLOPS
