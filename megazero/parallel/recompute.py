"""Activations computed again in backward instead of being kept (Chen et al., arXiv 1604.06174).

    forward     x ─► function ─► y          kept until backward: x alone
    backward    x ─► function ─► what its backward needs ─► gradients

torch's non-reentrant checkpointing does the work: the only kind that backwards in two halves take. Recomputing stops
at the last tensor that is needed, so a function's closing all-reduce is not paid again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as torch_checkpoint

from megazero.config.schema import RunConfig
from megazero.parallel.saved_inputs import SavedInputs
from megazero.parallel.topology import Topology


def checkpoint(
    function: Callable[..., Any], *args: Any, saved: SavedInputs | None = None, preserve_rng_state: bool = True
) -> Any:
    """`function(*args)`, whose backward computes it again from `args` instead of keeping its activations.

    Args:
        function: the same on the same arguments each time; it may communicate and may itself use `checkpoint`.
        saved: where tensors among `args` are kept; default: where they are. Leave it out of a checkpoint that is
            inside another: its inputs are the outer one's to compute again.
        preserve_rng_state: the second time starts from the state of torch's generators that the first started from.

    Raises torch.utils.checkpoint.CheckpointError in backward when the function did not do the same again.
    """
    keeping: AbstractContextManager[Any] = nullcontext() if saved is None else saved.hooks()
    with keeping:
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def without_keeping(inner: Callable[[Tensor], Tensor], outer: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """`outer(inner(x), *args)`, where what goes from one to the other is not kept for outer's backward but computed
    again from x; for an `inner` that is cheap and needs x itself in its own backward, such as a norm."""
    between = inner(x)
    again = _Again(inner, x.detach(), between)
    with saved_tensors_hooks(again.pack, again.unpack):
        return outer(between, *args)


class _Again:
    """Stands for `inner(x)`, and views of it, among the tensors that autograd saves.

    As many operations save it as read it (three projections, say): it is computed for the first and let go after the
    last.
    """

    def __init__(self, inner: Callable[[Tensor], Tensor], x: Tensor, result: Tensor) -> None:
        self.inner, self.x = inner, x
        self.memory, self.offset = _memory(result), int(result.storage_offset())
        self.packed = self.unpacked = 0
        self.result: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor | _View:
        if _memory(tensor) != self.memory:
            return tensor
        self.packed += 1
        return _View(tensor.shape, tensor.stride(), int(tensor.storage_offset()) - self.offset)

    @torch.no_grad()
    def unpack(self, packed: Tensor | _View) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        result = self.inner(self.x) if self.result is None else self.result
        self.unpacked += 1
        self.result = result if self.unpacked % self.packed else None
        return result.as_strided(packed.shape, packed.stride, result.storage_offset() + packed.offset)


def _memory(tensor: Tensor) -> int:
    """Which memory a tensor is a view of, on meta too (where all addresses are 0)."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class _View:
    """A view of `_Again`'s tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """In elements, from the tensor's own beginning."""


@dataclass(frozen=True)
class Recompute:
    """What a model computes again in backward. The default: nothing."""

    granularity: Literal["selective", "full"] | None = None
    modules: tuple[str, ...] = ()
    """selective: the parts of a block."""
    method: Literal["uniform", "block"] = "uniform"
    """full: uniform takes all blocks of a stage in chunks of `num_layers`, block the first `num_layers` one by one."""
    num_layers: int = 1
    saved: SavedInputs | None = field(default=None, compare=False)
    """full: where the inputs of blocks are kept; None: where they are."""

    @classmethod
    def of(cls, config: RunConfig, topology: Topology) -> Recompute:
        """As a resolved configuration says."""
        recompute = config.recompute
        modules = recompute.recompute_modules if recompute.recompute_granularity == "selective" else ()
        method, layers = recompute.recompute_method or "uniform", recompute.recompute_num_layers or 1
        saved = None
        if recompute.recompute_granularity == "full":
            held = -(-config.model.num_layers // topology.size("pp"))
            saved = SavedInputs(
                partition=topology.group("tp") if recompute.partition_activations else None,
                offload=recompute.cpu_checkpointing,
                slots=_inputs(method, layers, held) if recompute.contiguous_memory_optimization else 0,
            )
        return cls(recompute.recompute_granularity, modules, method, layers, saved)

    def takes(self, part: str) -> bool:
        """Whether this part of a block is computed again on its own."""
        return self.granularity == "selective" and part in self.modules

    def part(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, the part `name` of a block."""
        return checkpoint(function, *args, preserve_rng_state=False) if self.takes(name) else function(*args)


KEEP_ALL = Recompute()


def _inputs(method: str, num_layers: int, held: int) -> int:
    """How many inputs one micro-batch leaves on a rank that holds `held` blocks."""
    return -(-held // num_layers) if method == "uniform" else min(num_layers, held)
