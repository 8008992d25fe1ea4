"""Where what ZeRO keeps between uses lives: the device, CPU memory (pinned beside a GPU), or files on NVMe.

    optimizer: masters, moments, reduced gradients   device | CPU | masters and moments in files, gradients on CPU
    parameters (stage 3): this rank's shard          device | CPU | files

Ren et al., ZeRO-Offload, arXiv 2101.06840; Rajbhandari et al., ZeRO-Infinity, arXiv 2104.07857.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megazero.zero.nvme import NvmeStore, Transfer

__all__ = ["FileTensor", "Homes", "Place", "Transfer", "pinned"]

Where = Literal["none", "cpu", "nvme"]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class FileTensor:
    """A flat tensor that is a file of a store."""

    store: NvmeStore
    name: str
    numel: int
    dtype: torch.dtype

    def read(self, out: Tensor) -> Transfer:
        return self.store.read(self.name, out)

    def write(self, tensor: Tensor) -> Transfer:
        return self.store.write(self.name, tensor)

    def buffer(self) -> Tensor:
        """Memory for it; give it back with `release`."""
        return self.store.buffer(self.numel, self.dtype)

    def release(self, tensor: Tensor) -> None:
        self.store.release(tensor)

    def mapped(self) -> Tensor:
        """The file as memory, for checkpoints: reading it loads pages that the system may drop again, writing it
        writes the file."""
        return self.store.mapped(self.name, self.numel, self.dtype)


@dataclass(frozen=True)
class Place:
    """The homes of one bucket."""

    state_device: torch.device
    """Where masters, moments and reduced gradients are while the optimizer steps."""
    shard_device: torch.device
    """Where a sharded parameter's shard is kept."""
    state_store: NvmeStore | None = None
    shard_store: NvmeStore | None = None


@dataclass
class Homes:
    """The homes of all buckets, decided one bucket at a time in a fixed order.

    Args:
        ratio: share of the optimizer's elements that leaves the device.
        max_in_cpu: elements of parameter shards on this rank that stay in CPU memory before NVMe is used.
    """

    device: torch.device
    optimizer: Where = "none"
    param: Where = "none"
    optimizer_store: NvmeStore | None = None
    param_store: NvmeStore | None = None
    ratio: float = 1.0
    max_in_cpu: int = 0
    pipelined: bool = True
    """Read the next bucket's state, and write the last one's, while one is updated."""
    _seen: int = field(default=0, repr=False)
    _moved: int = field(default=0, repr=False)
    _in_cpu: int = field(default=0, repr=False)

    def place(self, elements: int, width: int) -> Place:
        """The homes of the next bucket, of so many elements, of which this rank keeps `width`."""
        state_device, state_store = self.device, None
        self._seen += elements
        if self.optimizer != "none" and self._moved + elements <= self.ratio * self._seen + 0.5 * elements:
            self._moved += elements
            state_device, state_store = _CPU, self.optimizer_store
        shard_device, shard_store = self.device, None
        if self.param != "none":
            shard_device = _CPU
            if self.param == "nvme":
                if self._in_cpu + width <= self.max_in_cpu:
                    self._in_cpu += width
                else:
                    shard_store = self.param_store
        return Place(state_device, shard_device, state_store, shard_store)

    def close(self) -> None:
        """Remove the files."""
        for store in (self.optimizer_store, self.param_store):
            if store is not None:
                store.close()


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """CPU memory page-locked when a GPU is to read and write it."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.is_cpu else tensor
