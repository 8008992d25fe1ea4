"""The launch's environment, devices with and without GPUs, peaks, and the measured GEMM rate."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megazero.base import launch as launch_module
from megazero.base.device import (
    default_backend,
    device_for,
    device_type,
    initialize_distributed,
    measure_gemm_flops,
    memory_bytes,
    peak_flops,
    shutdown_distributed,
)
from megazero.base.errors import ConfigError
from megazero.base.launch import Launch, cpu_threads_for

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
CPU = torch.device("cpu")


def test_a_plain_process_is_rank_0_of_1():
    assert Launch.from_environment({"HOME": "/"}) == Launch(0, 1, 0, 1)


def test_torchruns_variables_are_read():
    assert Launch.from_environment(TORCHRUN) == Launch(rank=5, world_size=8, local_rank=1, local_world_size=4)


def test_one_process_a_machine_needs_no_local_rank():
    environ = {name: value for name, value in TORCHRUN.items() if "LOCAL" not in name}
    assert Launch.from_environment(environ) == Launch(5, 8, 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "only some of .* RANK is not set.* Start with torchrun"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"LOCAL_WORLD_SIZE": None}, "LOCAL_WORLD_SIZE is not set"),
        ({"RANK": "five"}, "RANK='five' in the environment is not a whole number"),
        ({"RANK": "8"}, "RANK=8 with WORLD_SIZE=8: ranks count from 0"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 with LOCAL_WORLD_SIZE=4"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE=8 without MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_contradictory_environment_is_an_error(change, message):
    environ = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        Launch.from_environment(environ)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_any_number_of_ranks_shares_a_cpu(no_gpu):
    assert device_type() == "cpu"
    assert device_for(17, 64) == CPU
    assert default_backend("cpu") == "gloo"


@pytest.mark.usefixtures("two_gpus")
def test_each_rank_has_its_own_gpu():
    assert device_type() == "cuda"
    assert [device_for(r, 2) for r in (0, 1)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert default_backend("cuda") == "nccl"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("local_rank", "local_world_size"), [(2, 3), (0, 3), (2, 1)])
def test_more_ranks_than_gpus_is_an_error_on_every_rank(local_rank, local_world_size):
    with pytest.raises(ConfigError, match=r"3 ranks on this machine, but it shows 2 GPUs.*--nproc-per-node 2"):
        device_for(local_rank, local_world_size)


def test_one_process_needs_no_process_group():
    initialize_distributed(Launch(), "gloo", timeout_minutes=1)
    assert not dist.is_initialized()
    shutdown_distributed()


def test_impossible_backends_are_errors(no_gpu, monkeypatch):
    monkeypatch.setattr(dist, "is_backend_available", lambda backend: backend == "nccl")
    with pytest.raises(ConfigError, match="distributed-backend gloo: this torch was built without it"):
        initialize_distributed(Launch(0, 2, 0, 2), "gloo", timeout_minutes=1)
    with pytest.raises(ConfigError, match="nccl needs a GPU, and this machine shows none"):
        initialize_distributed(Launch(0, 2, 0, 2), "nccl", timeout_minutes=1)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.float16, 756),
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA Z9000", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
    ],
)
def test_vendor_peaks(monkeypatch, name, dtype, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if tflops is None else tflops * 1e12
    assert peak_flops(torch.device("cuda", 0), dtype) == expected


@pytest.mark.parametrize(("name", "tflops"), [("NVIDIA H100 80GB HBM3", 494), ("Tesla V100-SXM2-32GB", 15.7)])
def test_fp32_counts_as_tf32_only_where_torch_uses_it(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops(torch.device("cuda", 0), torch.float32) == tflops * 1e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_cpu_has_no_stated_peak():
    assert peak_flops(CPU, torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_measured_gemm_rate_is_quick_and_plausible(dtype):
    threads = torch.get_num_threads()
    start = time.perf_counter()
    rate = measure_gemm_flops(CPU, dtype, threads=1)
    assert time.perf_counter() - start < 2  # about 0.15 s on an idle machine
    assert 1e7 < rate < 1e14
    assert torch.get_num_threads() == threads


def test_memory_is_this_process_resident_set():
    before = memory_bytes(CPU)
    block = torch.ones(16 * 2**20, dtype=torch.float32)  # 64 MiB, written
    grown = memory_bytes(CPU) - before
    assert 48 * 2**20 < grown < 96 * 2**20
    assert block.sum().item() == block.numel()


@pytest.mark.parametrize(
    ("environ", "ranks", "threads"),
    [
        ({}, 1, 8),
        ({}, 2, 4),
        ({}, 3, 2),
        ({}, 64, 1),
        ({"OMP_NUM_THREADS": "3"}, 2, 3),
        ({"OMP_NUM_THREADS": "1"}, 2, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 2, 4),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, 2, 2),
        ({"OMP_NUM_THREADS": ""}, 2, 4),
    ],
)
def test_threads_share_the_cores_unless_the_user_says_otherwise(monkeypatch, environ, ranks, threads):
    monkeypatch.setattr(launch_module, "usable_cores", lambda: 8)
    assert cpu_threads_for(ranks, environ) == threads


def test_a_containers_quota_limits_the_cores(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(launch_module, "_CPU_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert cpu_threads_for(1, {}) == 16
    quota.write_text("400000 100000\n")
    assert cpu_threads_for(1, {}) == 4
    quota.write_text("50000 100000\n")
    assert cpu_threads_for(1, {}) == 1
    quota.write_text("max 100000\n")
    assert cpu_threads_for(1, {}) == 16


@pytest.mark.parametrize(("backend", "device"), [("gloo", None), ("nccl", torch.device("cuda", 1))])
def test_the_process_group_is_joined_with_the_launchs_place(two_gpus, monkeypatch, backend, device):
    joined, current = {}, []
    monkeypatch.setattr(dist, "is_backend_available", lambda name: True)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **options: joined.update(name=name, **options))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    initialize_distributed(Launch(rank=5, world_size=8, local_rank=1, local_world_size=2), backend, timeout_minutes=1.5)
    assert joined == {
        "name": backend,
        "rank": 5,
        "world_size": 8,
        "timeout": timedelta(seconds=90),
        "device_id": device,
    }
    assert current == ([] if device is None else [device])
