"""MB/s of saving and loading a state, megazero's checkpoint beside torch.distributed.checkpoint's own file format.

    python benchmarks/checkpoint.py [--megabytes 400] [--rounds 5] [--folder /tmp]

One process, fp32 tensors of a small decoder's shapes, rounds interleaved. Both wait for the disk (fsync); megazero also
writes a checksum of every byte and verifies it on loading, the stock format has none. Loads come from the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megazero.engine import checkpoint
from megazero.engine.checkpoint import Piece
from megazero.parallel.sharding import Box
from megazero.parallel.topology import Topology


def build_state(megabytes: int) -> dict[str, Tensor]:
    """Layers of width 1024 (four matrices and a norm each) up to about this size."""
    shapes = {"qkv": (3072, 1024), "proj": (1024, 1024), "up": (4096, 1024), "down": (1024, 4096), "norm": (1024,)}
    state: dict[str, Tensor] = {}
    while sum(tensor.nbytes for tensor in state.values()) < megabytes * 1e6:
        layer = len(state) // len(shapes)
        state |= {f"layers.{layer}.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return state


def pieces(state: dict[str, Tensor]) -> list[Piece]:
    return [Piece(n, tuple(t.shape), Box((0,) * t.dim(), tuple(t.shape)), t) for n, t in state.items()]


def seconds(action: Callable[[], object]) -> float:
    os.sync()  # what others wrote is not this action's to wait for
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def one_round(folder: Path, state: dict[str, Tensor], stock_first: bool) -> dict[str, float]:
    """Seconds of a save and a load of each kind."""
    group = Topology.single().group("world")
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    weights = {"weights": pieces(state)}
    saves = {
        "stock save": lambda: dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(folder / "stock")),
        "megazero save": lambda: checkpoint.save(folder / "megazero", 1, weights, {}, "", group),
    }
    loads = {
        "stock load": lambda: dcp.load(dict(target), storage_reader=dcp.FileSystemReader(folder / "stock")),
        "megazero load": lambda: checkpoint.load(folder / "megazero", 1, {"weights": pieces(target)}, group),
    }
    took: dict[str, float] = {}
    for actions in (saves, loads):
        for name in sorted(actions, reverse=stock_first):
            for tensor in target.values():
                tensor.zero_()
            took[name] = seconds(actions[name])
            if actions is loads:
                assert all(torch.equal(target[key], state[key]) for key in state), f"{name} gave other values"
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the disk measured")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    state = build_state(args.megabytes)
    megabytes = sum(tensor.nbytes for tensor in state.values()) / 1e6
    took: dict[str, list[float]] = {}
    for index in range(args.rounds):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for name, value in one_round(Path(folder), state, stock_first=index % 2 == 0).items():
                took.setdefault(name, []).append(value)
    print(f"{megabytes:.0f} MB in {len(state)} tensors, {args.rounds} rounds, median (best .. worst) MB/s")
    rate = {name: megabytes / statistics.median(values) for name, values in took.items()}
    for name, values in sorted(took.items()):
        print(f"{name:14} {rate[name]:7.0f}  ({megabytes / min(values):.0f} .. {megabytes / max(values):.0f})")
    for kind in ("save", "load"):
        print(f"megazero / stock, {kind}: {rate[f'megazero {kind}'] / rate[f'stock {kind}']:.2f}")


if __name__ == "__main__":
    main()
