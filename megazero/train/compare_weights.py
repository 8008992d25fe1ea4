"""Two checkpoints side by side, tensor by tensor, whatever the layouts that saved them; in one process.

    absolute = max |a - b| over the elements          relative = ‖a - b‖ / max(‖a‖, ‖b‖)

Two tensors are in memory at a time, in the type they are stored in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megazero.base.errors import CheckpointError
from megazero.engine.checkpoint import open_section, usable_steps
from megazero.engine.storage import read_tensor
from megazero.train.compare import WEIGHT_ATOL, settings_of

_CHUNK = 1 << 22  # elements compared in fp64 at a time


@dataclass(frozen=True)
class Difference:
    """How far two tensors of one name and shape are apart; infinite where one alone is not finite."""

    name: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class WeightComparison:
    """All logical tensors of two checkpoints."""

    iteration: int
    tensors: tuple[Difference, ...]
    """Worst first."""
    mismatched: tuple[str, ...]
    """Tensors that are in one checkpoint only, or whose shapes differ."""
    tolerance: float

    @property
    def equal(self) -> bool:
        return not self.mismatched and all(tensor.absolute <= self.tolerance for tensor in self.tensors)

    def text(self, top: int) -> str:
        """The `top` worst tensors, and what cannot be compared."""
        unequal = [tensor for tensor in self.tensors if tensor.absolute > 0]
        beyond = sum(tensor.absolute > self.tolerance for tensor in unequal)
        lines = [
            f"weights at iteration {self.iteration}, {len(self.tensors)} tensors: {len(self.tensors) - len(unequal)} "
            f"equal, {beyond} beyond the tolerance {self.tolerance:g} (absolute)"
        ]
        if unequal:
            lines.append("  max |a - b|   relative   tensor")
            lines += [f"  {each.absolute:11.2e}   {each.relative:8.2e}   {each.name}" for each in unequal[:top]]
        if len(unequal) > top:
            lines.append(f"  … and {len(unequal) - top} closer ones (--top {len(unequal)} shows them)")
        return "\n".join(lines + [f"  {line}" for line in self.mismatched])


def compare_weights(a: Path, b: Path, *, iteration: int | None = None, atol: float = WEIGHT_ATOL) -> WeightComparison:
    """Compare the weights of two run folders at `iteration`, by default the last that both have.

    Raises CheckpointError when a checkpoint is missing or damaged, or none is common.
    """
    stores = [_store(folder) for folder in (a, b)]
    if iteration is None:
        iteration = _last_common(stores)
    (folder_a, table_a), (folder_b, table_b) = (open_section(store, iteration, "weights") for store in stores)
    found: list[Difference] = []
    mismatched: list[str] = []
    for name in sorted(table_a.keys() | table_b.keys()):
        if name not in table_a or name not in table_b:
            mismatched.append(f"only in {'b' if name not in table_a else 'a'}: {name}")
        elif table_a[name].shape != table_b[name].shape:
            mismatched.append(f"shapes differ: {name} {list(table_a[name].shape)} | {list(table_b[name].shape)}")
        else:
            tensors = read_tensor(folder_a, table_a[name]), read_tensor(folder_b, table_b[name])
            found.append(Difference(name, *difference(*tensors)))
    found.sort(key=lambda tensor: (-tensor.absolute, -tensor.relative, tensor.name))
    return WeightComparison(iteration, tuple(found), tuple(mismatched), atol)


def difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(max |a - b|, ‖a - b‖ / max(‖a‖, ‖b‖)) of two tensors of one shape."""
    largest = squares = squares_a = squares_b = 0.0
    for part_a, part_b in zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), strict=True):
        x, y = part_a.double(), part_b.double()
        same = (x == y) | (x.isnan() & y.isnan())
        apart = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        largest = max(largest, float(apart.max()) if apart.numel() else 0.0)
        squares += float(apart.square().sum())
        squares_a, squares_b = squares_a + float(x.square().sum()), squares_b + float(y.square().sum())
    if not math.isfinite(squares) or largest == 0.0:
        return largest, largest
    return largest, math.sqrt(squares / max(squares_a, squares_b))


def _store(run: Path) -> Path:
    """Where a run keeps its checkpoints: beside its metrics, else where its settings say."""
    beside = run / "checkpoints"
    named = settings_of(run).get("checkpoint.save")
    return beside if beside.is_dir() or named is None else Path(named)


def _last_common(stores: list[Path]) -> int:
    steps = [usable_steps(store) for store in stores]
    common = set(steps[0]) & set(steps[1])
    if not common:
        held = " and ".join(
            f"{store} holds {', '.join(map(str, s)) or 'none'}" for store, s in zip(stores, steps, strict=True)
        )
        raise CheckpointError(
            f"no iteration has a checkpoint in both runs: {held}. Train both to the same --train-iters or "
            "--save-interval, or leave out --weights."
        )
    return max(common)
