"""This process's device, and joining the others: which GPU, which backend, how fast, how much memory."""

from __future__ import annotations

import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megazero.base.errors import ConfigError
from megazero.base.launch import Launch
from megazero.base.peaks import vendor_peaks


def device_type() -> str:
    """'cuda' where there is a usable GPU, else 'cpu'."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_for(local_rank: int, local_world_size: int = 1) -> torch.device:
    """The device of one rank: GPU number `local_rank`, or the CPU, which any number of ranks share.

    Raises ConfigError, on every rank of the machine, when its ranks are more than its GPUs.
    """
    if device_type() == "cpu":
        return torch.device("cpu")
    devices, ranks = torch.cuda.device_count(), max(local_rank + 1, local_world_size)
    if ranks > devices:
        raise ConfigError(
            f"{ranks} ranks on this machine, but it shows {devices} GPU{'s' * (devices != 1)}: one rank needs one. "
            f"Start at most {devices} (torchrun --nproc-per-node {devices}), "
            "or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU."
        )
    return torch.device("cuda", local_rank)


def default_backend(device_type: str) -> str:
    """The communication backend of a kind of device."""
    return "nccl" if device_type == "cuda" else "gloo"


def initialize_distributed(launch: Launch, backend: str, timeout_minutes: float) -> None:
    """Join the default process group; with nccl, also make this rank's GPU the current one. Nothing for one process.

    Collective over all ranks. Raises ConfigError when this torch or this machine cannot do `backend`.
    """
    if launch.world_size == 1:
        return
    if not dist.is_backend_available(backend):
        raise ConfigError(
            f"distributed-backend {backend}: this torch was built without it. Use gloo, or install another torch."
        )
    device = None
    if backend == "nccl":
        if device_type() == "cpu":
            raise ConfigError("distributed-backend nccl needs a GPU, and this machine shows none. Use gloo.")
        device = device_for(launch.local_rank, launch.local_world_size)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device,
    )


def shutdown_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the vendor states for dense matrix multiplies in `dtype`; None if unknown and on CPUs.

    fp32 counts as TF32 exactly where torch would use it (`torch.set_float32_matmul_precision`).
    """
    peaks = vendor_peaks(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peaks is None:
        return None
    tf32_on = torch.backends.cuda.matmul.fp32_precision == "tf32"
    rates = {
        torch.bfloat16: peaks.bf16,
        torch.float16: peaks.fp16,
        torch.float32: peaks.tf32 if tf32_on and peaks.tf32 else peaks.fp32,
    }
    rate = rates.get(dtype)
    return None if rate is None else rate * 1e12


def measure_gemm_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of the best of a few square matrix multiplies with `threads` CPU threads: the peak for MFU on a CPU.

    Takes about 0.1 s. The side is 1024, or 256 where a type is emulated so slowly that 1024 would take too long
    (fp16 on most CPUs).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        small = _best_gemm_seconds(device, dtype, side=256, budget_s=0.02)
        if small * 4**3 > 0.1:
            return 2 * 256**3 / small
        return 2 * 1024**3 / _best_gemm_seconds(device, dtype, side=1024, budget_s=0.1)
    finally:
        torch.set_num_threads(before)


def _best_gemm_seconds(device: torch.device, dtype: torch.dtype, side: int, budget_s: float) -> float:
    a, b = (torch.full((side, side), 0.5, device=device, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)  # also the warm-up
    best, end = float("inf"), time.perf_counter() + budget_s
    while best == float("inf") or time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device) -> int:
    """Peak bytes that tensors held on a GPU, or the bytes of RAM that this process holds (off Linux: its peak)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
