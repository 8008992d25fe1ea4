"""Claim: a model whose training state exceeds a process's memory trains under stage 3 with NVMe, and fails without.

    python benchmarks/memory_cap.py [--blocks 48] [--width 1024] [--ranks 2] [--cap MiB] [--steps 3] [--folder DIR]

bf16 weights, fp32 gradients, masters and moments: 18 bytes a parameter. Three runs of fresh processes, the model built
inside `megazero.zero.Init`: stage 3 without a cap, under the cap without offload (must fail for want of memory), under
the cap with weights, masters and moments in files (must give the first one's losses). Prints bytes of state, the cap,
and what was used at most (resident: the kernel's own maximum; data: the largest seen between the parts of a step);
exits with 1 where the claim does not hold.

The cap is RLIMIT_DATA, set before torch is imported: the heap and every private writable mapping, thus all tensors, and
what libraries allocate. It is `ulimit -d`. RLIMIT_AS (`ulimit -v`) would count torch's libraries, which are
files that all processes share, and address space that is reserved and never used; a cgroup's limit counts resident
pages, which is closest to the truth, but needs rights that a user seldom has. Files are written with O_DIRECT where the
file system has it, so the page cache does not stand in for memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
BYTES = 18
"""Of training state a parameter."""
UNCAPPED, CAPPED, OFFLOADED = "stage 3, no cap", "stage 3, capped", "stage 3 + NVMe, capped"


def configuration(folder: str | None) -> dict[str, Any]:
    """The ds_config; with a folder everything goes to NVMe."""
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_prefetch_bucket_size": 2_000_000,
        "stage3_max_live_parameters": 6_000_000,
        "stage3_max_reuse_distance": 0,
    }
    if folder is not None:
        nvme = {"device": "nvme", "nvme_path": folder}
        zero |= {"offload_optimizer": nvme, "offload_param": {**nvme, "max_in_cpu": 0}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": zero,
    }


def parameters(options: argparse.Namespace) -> int:
    return int(options.blocks * (options.width**2 + options.width))


def worker(options: argparse.Namespace) -> None:
    """One rank of one run: prints its figures as JSON."""
    if options.worker != UNCAPPED:
        resource.setrlimit(resource.RLIMIT_DATA, (options.cap * MIB, options.cap * MIB))
    import torch  # after the limit
    from torch import Tensor, nn

    import megazero

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(options.width, options.width)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x) / options.blocks

    torch.set_num_threads(1)
    torch.manual_seed(0)
    megazero.init_distributed()
    config = configuration(options.folder if options.worker == OFFLOADED else None)
    start = {"resident": status("VmRSS"), "data": status("VmData")}
    with megazero.zero.Init(config_dict_or_path=config):
        model = nn.Sequential(*[Block() for _ in range(options.blocks)])
    built = status("VmData")
    engine, *_ = megazero.initialize(model=model, config=config)
    losses, data = [], [start["data"], built, status("VmData")]
    for step in range(options.steps):
        x = torch.linspace(-1, 1, options.width)[None].mul(1 + step + engine.global_rank).bfloat16()
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        data.append(status("VmData"))
        engine.step()
        data.append(status("VmData"))
        assert engine.last is not None
        losses.append(engine.last.loss)
    gc.collect()
    peak = {"resident": status("VmHWM"), "data": max(data)}
    print("ANSWER " + json.dumps({"losses": losses, "start": start, "peak": peak}), flush=True)
    engine.destroy()
    torch.distributed.destroy_process_group()


def status(key: str) -> int:
    """Bytes, from the kernel: VmRSS and VmHWM are resident now and at most, VmData what RLIMIT_DATA limits."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


# the parent imports no torch


def run(name: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """All ranks of one run: their figures, or none and the last line of the first that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(options.ranks)}
    settings |= {"LOCAL_WORLD_SIZE": str(options.ranks), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # freed memory goes back to the system at once, in place of staying in an allocator's pools
    settings |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        logs = [Path(folder) / f"log-{rank}" for rank in range(options.ranks)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--folder", folder]
                processes.append(
                    subprocess.Popen(
                        [*command, "--cap", str(options.cap)],
                        env={**os.environ, **settings, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        failed = wait(processes)
        if failed is not None:
            return [], why(logs[failed].read_text(), processes[failed].returncode)
        texts = [log.read_text() for log in logs]
    return [json.loads(text.split("ANSWER ")[1].splitlines()[0]) for text in texts], ""


def wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Until all have ended well, or one has not: which; the others are ended then."""
    waiting = dict(enumerate(processes))
    while waiting:
        for rank, process in list(waiting.items()):
            try:
                code = process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            del waiting[rank]
            if code:
                for other in waiting.values():
                    other.kill()
                    other.wait()
                return rank
    return None


def why(text: str, code: int) -> str:
    """The error that a process ended with."""
    lines = [line for line in text.splitlines() if "Error" in line and not line.startswith(" ")]
    return lines[-1] if lines else f"exit code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=96, help="of width² + width parameters each")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cap", type=int, help="MiB of data of each process; default: half of the training state")
    parser.add_argument("--folder", help="for the files, on a fast local disk; a temporary one by default")
    parser.add_argument("--worker", choices=[UNCAPPED, CAPPED, OFFLOADED], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    options.cap = options.cap or BYTES * parameters(options) // 2 // MIB
    sys.exit(compare(options))


def compare(options: argparse.Namespace) -> int:
    """All three runs; 0 if the claim holds."""
    state = BYTES * parameters(options)
    print(
        f"{parameters(options) / 1e6:.1f} million parameters, {state / MIB:.0f} MiB of training state, "
        f"{state / options.ranks / MIB:.0f} on each of {options.ranks} ranks; cap {options.cap} MiB of data a process"
    )
    print(f"{'':22} {'at start':>14} {'at most':>14}   MiB: data (resident)")
    found, errors = {}, {}
    for name in (UNCAPPED, CAPPED, OFFLOADED):
        found[name], errors[name] = run(name, options)
        print(f"{name:22} {line(found[name]) or errors[name]}", flush=True)
    losses = {name: [answer["losses"] for answer in answers] for name, answers in found.items()}
    problems = []
    if options.cap * MIB >= state:
        problems.append("the cap is not below the training state: give a smaller --cap, or more --blocks")
    if found[CAPPED] or "memory" not in errors[CAPPED].lower():
        problems.append("without offload it should have failed for want of memory")
    if not found[OFFLOADED] or losses[OFFLOADED] != losses[UNCAPPED]:
        problems.append(f"with offload it should have given the losses {losses[UNCAPPED]}, not {losses[OFFLOADED]}")
    for problem in problems:
        print(f"NOT SO: {problem}")
    return int(bool(problems))


def line(answers: list[dict[str, Any]]) -> str:
    """The figures of the rank that used most."""
    if not answers:
        return ""
    worst = max(answers, key=lambda answer: answer["peak"]["data"])
    parts = [f"{worst[when]['data'] / MIB:5.0f} ({worst[when]['resident'] / MIB:5.0f})" for when in ("start", "peak")]
    return f"{parts[0]:>14} {parts[1]:>14}   losses " + " ".join(f"{loss:.5f}" for loss in worst["losses"])


if __name__ == "__main__":
    main()
