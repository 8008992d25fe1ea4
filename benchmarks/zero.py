"""Claim: ZeRO stages 0-3 and offload train any torch module at about DDP's speed, in the memory of the stages' table.

    python benchmarks/zero.py [--ranks 2] [--rounds 5] [--steps 3] [--precision fp32|bf16] [--only ddp stage3 …]

One GPT-like model of torch's own layers (20 million parameters), the same batches. Every configuration is a set of
fresh processes that live through the whole run and take `--steps` steps in turn: A B C … A B C …; the others sleep on
a pipe meanwhile. Prints tokens/s and its ratio to DDP by round (median, min, max); peak resident memory of the worst
rank (VmHWM on CPU, whole process; and without what it had before the model was built) or of the device; the bytes of
tensors by component between steps; and the loss after the last step, which has to agree. Peers: torch DDP and
fully_shard on every block, both with fused AdamW and clip_grad_norm_ (bf16: DDP under autocast, fully_shard with bf16
weights on the wire, fp32 reduction).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import megazero
from megazero.engine.introspection import state_bytes

ROOT = Path(__file__).resolve().parent.parent
ADAM = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
Step = Callable[[Tensor], float]
Bytes = dict[str, int]
"""Of tensors on this rank between steps, by component."""

ZERO: dict[str, dict[str, Any]] = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3},
    "stage2+cpu": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "stage3+nvme": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme"},
        "offload_param": {"device": "nvme", "max_in_cpu": 0},
    },
}


class Block(nn.Module):
    """A pre-norm GPT block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (b, s, h)
        b, s, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (b, n, s, d) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Small(nn.Module):
    """Embedding, blocks, head: 20 million parameters by default. Gives the mean loss."""

    def __init__(self, vocab: int = 6144, width: int = 448, heads: int = 7, blocks: int = 6, length: int = 256) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, text: Tensor) -> Tensor:  # (b, s + 1)
        x = self.embed(text[:, :-1]) + self.positions.weight[: text.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), text[:, 1:].flatten())


def build() -> Small:
    torch.manual_seed(0)
    return Small()


# the configurations: each gives a step and a look at its tensors


def ddp(device: torch.device, options: argparse.Namespace) -> tuple[Step, Callable[[], Bytes]]:
    model = build().to(device)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAM)
    low = options.precision == "bf16"

    def step(text: Tensor) -> float:
        optimizer.zero_grad(set_to_none=False)  # the gradients live in DDP's buckets
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss = wrapped(text)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step, lambda: torch_bytes(model, optimizer)


def sharded(device: torch.device, options: argparse.Namespace) -> tuple[Step, Callable[[], Bytes]]:
    model = build().to(device)
    mesh = dist.init_device_mesh(device.type, (options.ranks,))
    policy = MixedPrecisionPolicy()
    if options.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAM)

    def step(text: Tensor) -> float:
        loss = model(text)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, lambda: torch_bytes(model, optimizer)


def megazero_stage(
    settings: dict[str, Any], device: torch.device, options: argparse.Namespace
) -> tuple[Step, Callable[[], Bytes]]:
    for key in ("offload_optimizer", "offload_param"):
        if settings.get(key, {}).get("device") == "nvme":
            settings = {**settings, key: {**settings[key], "nvme_path": options.folder}}
    config = {
        "train_micro_batch_size_per_gpu": options.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": ADAM},
        "bf16": {"enabled": options.precision == "bf16"},
        "zero_optimization": settings,
    }
    engine, *_ = megazero.initialize(model=build(), config=config)

    def step(text: Tensor) -> float:
        loss = engine(text)
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step, lambda: state_bytes(engine.module, engine.zero, engine.shards)


def torch_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> Bytes:
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return {
        "weights": nbytes(model.parameters()),
        "gradients": nbytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": nbytes(state),
    }


def nbytes(tensors: Iterable[Tensor]) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


# one process of one configuration: commands come as lines on stdin, answers leave as lines of JSON


def worker(options: argparse.Namespace) -> None:
    rank = int(os.environ["RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(options.threads)
    meet = f"file://{options.folder}/meet-{options.worker}"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=meet, rank=rank, world_size=options.ranks)
    dist.barrier()
    before = resident("VmRSS")
    try:
        builders: dict[str, Callable[..., tuple[Step, Callable[[], Bytes]]]] = {"ddp": ddp, "fully_shard": sharded}
        if options.worker in builders:
            step, look = builders[options.worker](device, options)
        else:
            step, look = megazero_stage(ZERO[options.worker], device, options)
        generator = torch.Generator().manual_seed(rank)
        texts = [
            torch.randint(0, 6144, (options.batch, options.length + 1), generator=generator).to(device)
            for _ in range(options.steps)
        ]
        serve(step, look, texts, before, cuda)
    except Exception as error:  # said in the table, and the others go on
        answer({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        raise
    dist.destroy_process_group()


def serve(step: Step, look: Callable[[], Bytes], texts: list[Tensor], before: int, cuda: bool) -> None:
    loss = float("nan")
    for command in sys.stdin:
        if command == "steps\n":
            dist.barrier()
            start = time.perf_counter()
            for text in texts:
                loss = step(text)
            dist.barrier()
            if cuda:
                torch.cuda.synchronize()
            answer({"seconds": time.perf_counter() - start, "loss": loss})
        elif command == "memory\n":
            peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
            answer({"peak": peak, "above": peak if cuda else peak - before, "bytes": look()})
        else:
            return


def resident(key: str) -> int:
    """Bytes of this process's resident memory: VmRSS now, VmHWM at most since the program was started."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def answer(value: dict[str, Any]) -> None:
    print("ANSWER " + json.dumps(value), flush=True)


# the parent: one Configuration holds its processes


class Configuration:
    """The processes of one configuration."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.rates, self.losses = name, list[float](), list[float]()
        self.error: str | None = None
        self.processes = []
        for rank in range(options.ranks):
            settings = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
            settings |= {"WORLD_SIZE": str(options.ranks), "LOCAL_WORLD_SIZE": str(options.ranks)}
            settings |= {"OMP_NUM_THREADS": str(options.threads)}
            if options.return_memory:
                settings |= {"MALLOC_MMAP_THRESHOLD_": "1000000"}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--folder", options.folder],
                    env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=None if options.verbose else subprocess.DEVNULL,
                    text=True,
                )
            )

    def ask(self, command: str) -> list[dict[str, Any]]:
        """Every rank's answer, or nothing when one has failed."""
        if self.error is not None:
            return []
        answers = []
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(command + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                continue  # its last words are read below
        for process in self.processes:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("ANSWER ")), 'ANSWER {"error": "it died"}')
            answers.append(json.loads(line.removeprefix("ANSWER ")))
            if "error" in answers[-1]:
                self.error = answers[-1]["error"]
                self.stop()
                return []
        return answers

    def run(self, tokens: int) -> None:
        if answers := self.ask("steps"):
            self.rates.append(tokens / max(a["seconds"] for a in answers))
            self.losses.append(statistics.mean(a["loss"] for a in answers))

    def stop(self) -> None:
        for process in self.processes:
            if self.error is not None:
                process.kill()
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def report(configurations: list[Configuration]) -> None:
    base = next((c.rates for c in configurations if c.name == "ddp"), [])
    print(
        f"{'':12} {'tokens/s':>9}  {'ratio to DDP (min-max)':24} {'peak MB':>8} {'+ MB':>6}  {'loss':>8}  "
        "MB by component"
    )
    for c in configurations:
        memory = c.ask("memory")
        if c.error is not None:
            print(f"{c.name:12} {c.error}")
            continue
        ratios = sorted(a / b for a, b in zip(c.rates, base, strict=False))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else "-"
        worst = max(memory, key=lambda m: m["peak"])
        parts = "  ".join(f"{key} {value / 1e6:.0f}" for key, value in worst["bytes"].items() if value)
        print(
            f"{c.name:12} {statistics.median(c.rates):9.0f}  {ratio:24} {worst['peak'] / 1e6:8.0f} "
            f"{worst['above'] / 1e6:6.0f}  {c.losses[-1]:8.5f}  {parts}",
            flush=True,
        )


def main() -> None:
    names = ["ddp", "fully_shard", *ZERO]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a rank and step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--folder", help="for offload to NVMe; a temporary folder by default")
    parser.add_argument(
        "--return-memory",
        action="store_true",
        help="have malloc give freed memory back at once: peaks then show what was in use, not what the heap has kept",
    )
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = folder
        configurations = [Configuration(name, options) for name in options.only]
        try:
            for c in configurations:  # warm up
                c.run(1)
                c.rates.clear()
            tokens = options.ranks * options.steps * options.batch * options.length
            for _ in range(options.rounds):
                for c in configurations:
                    c.run(tokens)
            report(configurations)
        finally:
            for c in configurations:
                c.stop()


if __name__ == "__main__":
    main()
