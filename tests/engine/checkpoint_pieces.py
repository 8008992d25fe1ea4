"""For the checkpoint tests: pieces of tensors cut into flat slices, a small model's state, and checkpoints of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megazero.engine.boxed import Piece
from megazero.engine.checkpoint import load, save
from megazero.parallel.sharding import Box, flat_slice_boxes
from megazero.parallel.topology import AxisGroup


def single() -> AxisGroup:
    return AxisGroup("world", (0,), 0, None)


def flat_pieces(name: str, shape: Sequence[int], memory: Tensor, start: int) -> list[Piece]:
    """Pieces of elements [start, start + memory.numel()) of a tensor, held in flat `memory`."""
    boxes = flat_slice_boxes(tuple(shape), start, start + memory.numel())
    return [Piece(name, tuple(shape), box, memory[at : at + box.numel].view(box.shape)) for at, box in boxes]


def whole_piece(name: str, tensor: Tensor) -> Piece:
    shape = tuple(tensor.shape)
    return Piece(name, shape, Box((0,) * len(shape), shape), tensor)


def whole_pieces(state: dict[str, Tensor]) -> list[Piece]:
    return [whole_piece(name, tensor) for name, tensor in state.items()]


def logical_state(shift: float = 0.0) -> dict[str, Tensor]:
    """A 3-D tensor, a matrix, a vector and a scalar; every element tells where it is."""
    shapes: dict[str, tuple[int, ...]] = {"experts": (3, 5, 4), "up.weight": (8, 6), "norm.weight": (7,), "scale": ()}
    return {
        name: torch.arange(max(1, int(torch.tensor(shape).prod())), dtype=torch.float32).reshape(shape)
        + 100 * i
        + shift
        for i, (name, shape) in enumerate(shapes.items())
    }


def zeros_like(state: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in state.items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def payload_of(folder: Path) -> Path:
    """The first payload file of a checkpoint's weights."""
    return next(path for path in files_of(folder) if path.parent.name == "weights" and path.suffix == ".safetensors")


STATE = {"iteration": 10, "lr": 3e-4, "nested": {"seeds": [1, 2]}, "note": "é"}


def save_step(directory: Path, iteration: int, shift: float = 0.0) -> None:
    sections = {"weights": whole_pieces(logical_state(shift)), "optimizer": whole_pieces(logical_state(shift + 0.5))}
    save(directory, iteration, sections, STATE | {"iteration": iteration}, "model: tiny\n", single())


def load_weights(directory: Path, iteration: int | None = None) -> dict[str, torch.Tensor]:
    target = zeros_like(logical_state())
    load(directory, iteration, {"weights": whole_pieces(target)}, single())
    return target
