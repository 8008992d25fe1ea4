"""Resident memory of each rank, by stage and offload, as the system sees it; and a model that only fits with offload.

Ψ parameters, fp32 weights (which are their own masters) and gradients, Adam, N ranks. Kept between steps, in bytes:

    stage 0  4Ψ + 4Ψ + 8Ψ       stage 2  4Ψ + (4Ψ + 8Ψ)/N       stage 3 + NVMe  4Ψ/N of gradients, and buffers
    stage 1  4Ψ + 4Ψ + 8Ψ/N     stage 3  (4Ψ + 4Ψ + 8Ψ)/N
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20

MODEL = """
import gc, json, os, resource, sys, time
import torch
import torch.distributed as dist
from torch import nn
import megazero

def resident(key):
    text = open("/proc/self/status").read()
    return int(text.split(key + ":")[1].split()[0]) * 1024

def settled():
    # when threads of the process group have let go of what they sent
    gc.collect()
    before, now = None, resident("VmRSS")
    while before is None or now < before:
        before = now
        time.sleep(0.3)
        now = resident("VmRSS")
    return now

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1024, 1024)

    def forward(self, x):
        return x + self.linear(x)

def build(blocks):
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(blocks)])

def config(stage, **offload):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {
            "stage": stage,
            "stage3_prefetch_bucket_size": 2_100_000,  # two blocks
            "stage3_max_live_parameters": 4_200_000,
            "stage3_max_reuse_distance": 0,
            **offload,
        },
    }

def train(engine, steps):
    x = torch.linspace(-1, 1, 1024)[None]
    for _ in range(steps):
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
    return float(loss)
"""

STAGES = """
nvme = {"device": "nvme", "nvme_path": sys.argv[1], "buffer_count": 2}
runs = {
    "stage 0": config(0), "stage 1": config(1), "stage 2": config(2), "stage 3": config(3),
    "stage 3 + nvme": config(3, offload_optimizer=nvme, offload_param={**nvme, "max_in_cpu": 0}),
}
torch.set_num_threads(1)
ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", **ranks)  # a free port may be taken again
megazero.initialize(model=build(1), config=config(3))  # what the first one allocates for all
found = {}
for name, settings in runs.items():
    before = settled()
    engine = megazero.initialize(model=build(BLOCKS), config=settings)[0]
    train(engine, 2)
    kept = settled() - before
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from here
    loss = train(engine, 1)
    found[name] = [kept, resident("VmHWM") - before, loss]
    del engine
print("FOUND " + json.dumps(found), flush=True)
"""

CAPPED = """
settings = config(3)
if sys.argv[2] == "offload":
    nvme = {"device": "nvme", "nvme_path": sys.argv[1]}
    settings = config(3, offload_optimizer=nvme, offload_param={**nvme, "max_in_cpu": 0})
torch.set_num_threads(1)
model = build(BLOCKS)
train(megazero.initialize(model=build(1), config=config(3))[0], 1)
gc.collect()
whole = 12 * sum(p.numel() for p in model.parameters())  # gradients and moments; the weights are there
limit = resident("VmData") + whole // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
engine, *_ = megazero.initialize(model=model, config=settings)
print("FOUND " + json.dumps(train(engine, 3)), flush=True)
"""


@contextmanager
def started(program: str, arguments: list[str], ranks: int, blocks: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Fresh processes, whose allocator gives freed memory back at once; killed at the end, if they still run."""
    base = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, and not used: the ranks meet at a file
    base |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MODEL + program.replace("BLOCKS", str(blocks)), *arguments]
    with ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            process = subprocess.Popen(
                command,
                env={**os.environ, **base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield processes


def answer(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    (line,) = (line for line in out.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def test_resident_memory_falls_as_the_table_says(tmp_path: Path) -> None:
    blocks, ranks = 16, 2
    psi = blocks * (1024 * 1024 + 1024)
    with started(STAGES, [str(tmp_path)], ranks, blocks) as processes:
        found = [answer(process) for process in processes]
    expected = {
        "stage 0": 16 * psi,
        "stage 1": 8 * psi + 8 * psi / ranks,
        "stage 2": 4 * psi + 12 * psi / ranks,
        "stage 3": 16 * psi / ranks,
        "stage 3 + nvme": 4 * psi / ranks,
    }
    for name, nbytes in expected.items():
        kept, peak, loss = zip(*(of_rank[name] for of_rank in found), strict=True)
        print(f"{name}: table {nbytes / MIB:.0f} MiB, kept {max(kept) / MIB:.0f}, peak {max(peak) / MIB:.0f}")
        slack = 20 * MIB  # buffers of a few blocks (4 MiB each), threads, allocator
        assert 0.95 * nbytes - 2 * MIB < min(kept) and max(kept) < 1.05 * nbytes + slack, (name, kept, nbytes)
        assert max(peak) < 1.05 * nbytes + 3 * slack, (name, peak, nbytes)
        assert max(kept) - min(kept) < 0.01 * nbytes + 8 * MIB, (name, kept)
        assert abs(loss[0] - found[0]["stage 0"][2]) <= 1e-6 * abs(loss[0]), (name, loss)


def test_a_model_that_does_not_fit_trains_with_offload(tmp_path: Path) -> None:
    with (
        started(CAPPED, [str(tmp_path), "offload"], 1, 32) as (fits,),
        started(CAPPED, [str(tmp_path), "none"], 1, 32) as (fails,),
    ):
        assert answer(fits) > 0
        error = fails.communicate(timeout=120)[1]
    assert fails.returncode != 0 and "memory" in error.splitlines()[-1], error[-3000:]
