"""From a run's settings to its Zero: where things live, when and in which type they travel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megazero.config.schema import OffloadConfig, RunConfig
from megazero.parallel.topology import Topology
from megazero.zero.buckets import Placed
from megazero.zero.gather import Limits
from megazero.zero.homes import Homes
from megazero.zero.nvme import NvmeStore
from megazero.zero.zero import Zero


def zero_of(
    config: RunConfig,
    module: nn.Module,
    topology: Topology,
    *,
    dtype: torch.dtype,
    device: torch.device,
    initial: Callable[[Placed], Tensor],
    units: list[str],
    trained: Callable[[nn.Parameter], bool] = lambda parameter: True,
) -> Zero:
    """Zero over `module` as a resolved configuration asks for it.

    Raises ConfigError and OffloadError when the folders for NVMe cannot be used.
    """
    parallel = config.parallel
    limits = Limits(
        parallel.stage3_prefetch_bucket_size, parallel.stage3_max_live_parameters, parallel.stage3_max_reuse_distance
    )
    return Zero(
        module,
        topology,
        stage=parallel.zero_stage,
        dtype=dtype,
        device=device,
        initial=initial,
        units=units,
        bucket_elements=parallel.ddp_bucket_size,
        overlap_reduce=parallel.overlap_grad_reduce,
        overlap_gather=parallel.overlap_param_gather,
        wire_dtype=torch.bfloat16 if parallel.grad_reduce_in_bf16 else None,
        grad_dtype=dtype if parallel.grad_accum_dtype == "model" else torch.float32,
        limits=limits,
        persistence_threshold=parallel.stage3_param_persistence_threshold or 0,
        trained=trained,
        homes=homes_of(config.offload, device),
    )


def homes_of(offload: OffloadConfig, device: torch.device) -> Homes:
    """The homes that the settings name, their folders made."""
    optimizer_store = param_store = None
    if offload.offload_optimizer == "nvme":
        assert offload.offload_optimizer_path is not None
        optimizer_store = _store(offload, offload.offload_optimizer_path, offload.offload_optimizer_buffer_count)
    if offload.offload_param == "nvme":
        assert offload.offload_param_path is not None
        param_store = _store(
            offload, offload.offload_param_path, offload.offload_param_buffer_count, "--offload-param-path"
        )
    return Homes(
        device,
        optimizer=offload.offload_optimizer,
        param=offload.offload_param,
        optimizer_store=optimizer_store,
        param_store=param_store,
        ratio=offload.offload_ratio,
        max_in_cpu=offload.offload_max_in_cpu,
        pipelined=offload.offload_pipeline_read or offload.offload_pipeline_write,
    )


def _store(offload: OffloadConfig, path: str, buffers: int, flag: str = "--offload-optimizer-path") -> NvmeStore:
    return NvmeStore(
        path,
        block_size=offload.nvme_block_size,
        queue_depth=offload.nvme_queue_depth,
        threads=offload.nvme_threads,
        buffers=buffers,
        pin_memory=offload.offload_pin_memory,
        setting=f"nvme_path ({flag})",
    )
