"""Claim: ZeRO-1 trains the quickstart model at least as fast as plain torch DDP trains the same architecture.

    python benchmarks/ddp.py [--ranks 2] [--rounds 6] [--steps 4] [--recipe recipes/quickstart.yaml] [--compile]

Both run in the same processes, in turn (A B A B), on the same batches: megazero's engine on its GPT, and a model of
the same sizes written with nn.Linear, nn.RMSNorm, SDPA and F.cross_entropy under DistributedDataParallel with fused
AdamW and clip_grad_norm_ (bf16: autocast over fp32 weights). Prints tokens/s, their ratio by round, and the share of
the measured matrix-multiply rate that model FLOPs amount to.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megazero.base.device import measure_gemm_flops
from megazero.config.flags import parse_run_config
from megazero.config.schema import RunConfig, TransformerConfig
from megazero.config.validate import resolve
from megazero.engine.engine import DTYPES, Engine
from megazero.models.gpt import GPT, Inputs
from megazero.ops.dropout import Randomness
from megazero.ops.rope import rope_frequencies
from megazero.parallel.topology import Topology
from megazero.plan.flops import flops_per_token

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[list[Tensor]], float]


class PlainBlock(nn.Module):
    """A Llama block as one would write it with torch alone."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        assert c.kv_channels and c.num_query_groups and c.ffn_hidden_size
        h, self.d = c.hidden_size, c.kv_channels
        self.norm1, self.norm2 = nn.RMSNorm(h, c.norm_epsilon), nn.RMSNorm(h, c.norm_epsilon)
        self.q = nn.Linear(h, c.num_attention_heads * self.d, bias=False)
        self.k = nn.Linear(h, c.num_query_groups * self.d, bias=False)
        self.v = nn.Linear(h, c.num_query_groups * self.d, bias=False)
        self.o = nn.Linear(c.num_attention_heads * self.d, h, bias=False)
        self.gate, self.up = (nn.Linear(h, c.ffn_hidden_size, bias=False) for _ in range(2))
        self.down = nn.Linear(c.ffn_hidden_size, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        n = self.norm1(x)
        q, k, v = (p(n).view(b, s, -1, self.d).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = (t * cos + torch.cat([-t[..., self.d // 2 :], t[..., : self.d // 2]], -1) * sin for t in (q, k))
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, -1))
        n = self.norm2(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class PlainModel(nn.Module):
    """The same architecture, torch's own parts."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        assert c.vocab_size and c.kv_channels
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.norm_epsilon)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.register_buffer("frequencies", rope_frequencies(c.kv_channels, c.rotary_base), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        angles = torch.arange(tokens.shape[1], device=tokens.device).float().outer(self.frequencies)
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


def ddp_step(config: RunConfig, device: torch.device, compile_blocks: bool) -> Step:
    """One step of plain torch."""
    model = PlainModel(config.model).to(device)
    if compile_blocks:
        for block in model.blocks:
            block.compile()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    low = config.training.precision == "bf16"

    def step(micro_batches: list[Tensor]) -> float:
        total = 0.0
        for index, text in enumerate(micro_batches):
            ddp.require_backward_grad_sync = index == len(micro_batches) - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                loss = ddp(text[:, :-1], text[:, 1:]) / len(micro_batches)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def megazero_step(config: RunConfig, device: torch.device, compile_blocks: bool) -> Step:
    """One step of the engine."""
    topology = Topology.build(device_type=device.type)
    model = GPT(config.model, topology)
    units = [f"model.layers.{index}" for index in range(config.model.num_layers)]
    engine = Engine(model, topology, config, device, units)
    if compile_blocks:
        for layer in model.model.layers:
            layer.compile()

    def loss_sum(module: nn.Module, text: Tensor) -> Tensor:
        randomness = Randomness(0, 0, torch.arange(text.shape[0]))
        result: Tensor = module(Inputs(text[:, :-1], randomness), text[:, 1:])
        return result

    def step(micro_batches: list[Tensor]) -> float:
        count = float(sum(text[:, 1:].numel() for text in micro_batches))
        return engine.train_step(micro_batches, loss_sum, count, lr=1e-4).loss

    return step


def worker(rank: int, options: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(options.threads)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=options.ranks)
    for precision in options.precision:
        base = parse_run_config(["--recipe", options.recipe, "--mock-data", "--vocab-size", str(options.vocab_size)])
        config = resolve(replace(base, training=replace(base.training, precision=precision)), options.ranks)
        measure(rank, config, device, options)
    dist.destroy_process_group()


def measure(rank: int, config: RunConfig, device: torch.device, options: argparse.Namespace) -> None:
    training = config.training
    assert training.global_batch_size and config.model.vocab_size
    micro_batches = training.global_batch_size // (training.micro_batch_size * options.ranks)
    shape = (training.micro_batch_size, config.data.seq_length + 1)
    generator = torch.Generator().manual_seed(rank)
    text = [
        torch.randint(0, config.model.vocab_size, shape, generator=generator).to(device) for _ in range(micro_batches)
    ]
    steps = {
        "megazero": megazero_step(config, device, options.compile),
        "DDP": ddp_step(config, device, options.compile),
    }
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # warm up
        step(text)
        step(text)
    tokens = options.steps * training.global_batch_size * config.data.seq_length
    for _ in range(options.rounds):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(options.steps):
                step(text)
            dist.barrier()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rates[name].append(tokens / (time.perf_counter() - start))
    gemm = measure_gemm_flops(device, DTYPES[training.precision], torch.get_num_threads())
    if rank == 0:
        flops = flops_per_token(config.model, config.data.seq_length) / options.ranks
        ratios = sorted(a / b for a, b in zip(rates["megazero"], rates["DDP"], strict=True))
        for name, values in rates.items():
            rate = statistics.median(values)
            print(f"{training.precision} {name:9} {rate:9.0f} tokens/s   {rate * flops / gemm:.2f} of the GEMM rate")
        print(
            f"{training.precision} ratio megazero / DDP: median {statistics.median(ratios):.3f}, "
            f"min {ratios[0]:.3f}, max {ratios[-1]:.3f} over {len(ratios)} rounds "
            f"(GEMM {gemm / 1e9:.0f} GFLOP/s a rank)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--recipe", default=str(ROOT / "recipes/quickstart.yaml"))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.multiprocessing.spawn(worker, (options,), nprocs=options.ranks)


if __name__ == "__main__":
    main()
