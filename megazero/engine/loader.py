"""Micro-batches of a user's dataset for one data-parallel rank, in an order that depends on (seed, epoch) alone.

    order of the epoch   5 2 7 0 3 6 1 4        rank r of n takes places r, r + n, r + 2n, …
    rank 0 of 2          5   7   3   1          so the first k micro-batches of all ranks hold the first places of the
    rank 1 of 2            2   0   6   4        order, whatever the number of ranks and the size of a micro-batch

The position counts samples of all ranks, so that another number of ranks goes on where these left off. Each pass over
the loader is a new epoch. The ranks of one model replica (tp, pp, cp) see the same data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, cast
from zlib import crc32

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from megazero.base.errors import ConfigError
from megazero.parallel.topology import AxisGroup


class ShardedSampler(Sampler[int]):
    """This rank's places of an epoch's order, from `start` on. Set `epoch` and `start` before iterating."""

    def __init__(self, length: int, group: AxisGroup, *, seed: int, shuffle: bool, multiple: int, drop: bool) -> None:
        self.length, self.group, self.seed, self.shuffle = length, group, seed, shuffle
        self.multiple, self.drop = multiple, drop
        self.epoch = self.start = 0

    @property
    def total(self) -> int:
        """Samples of an epoch over all ranks: the dataset's, cut to whole micro-batches, or filled up from its start
        to equal shares."""
        if self.drop:
            return self.length // (self.multiple * self.group.size) * self.multiple * self.group.size
        return -(-self.length // self.group.size) * self.group.size

    def __len__(self) -> int:
        return max(self.total - self.start, 0) // self.group.size

    def __iter__(self) -> Iterator[int]:
        order: Sequence[int] = range(self.length)
        if self.shuffle:
            generator = torch.Generator().manual_seed(crc32(f"{self.seed} epoch {self.epoch}".encode()))
            order = torch.randperm(self.length, generator=generator).tolist()
        for place in range(self.start + self.group.rank, self.total, self.group.size):
            yield order[place % self.length]


class _Share(IterableDataset[Any]):
    """Every n-th item of a stream, from `start` on."""

    def __init__(self, stream: Iterable[Any], group: AxisGroup) -> None:
        self.stream, self.group, self.start = stream, group, 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.stream), self.start + self.group.rank, None, self.group.size)


class Loader:
    """Iterate over it for one epoch of this rank's micro-batches.

    Args:
        data: a map-style dataset (`len` and `[i]`), or an iterable one, of which rank r takes items r, r + n, ….
        group: the ranks among which samples are divided.
        drop_last: leave out what does not fill a micro-batch on every rank; otherwise the last one is smaller, and
            ranks without a sample of their own for it take one from the start of the order.

    Raises ConfigError for data that is empty, or too little for drop_last.
    """

    def __init__(
        self,
        data: Dataset[Any] | Iterable[Any],
        group: AxisGroup,
        *,
        micro_batch_size: int,
        seed: int = 1234,
        shuffle: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        pin_memory: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.group, self.micro_batch_size = group, micro_batch_size
        self.epoch, self._samples = 0, 0
        self._begun = self._resumed = False
        self._sampler: ShardedSampler | None = None
        settings: dict[str, Any] = {
            "batch_size": micro_batch_size,
            "collate_fn": collate_fn,
            "drop_last": drop_last,
            "pin_memory": pin_memory,
            "num_workers": num_workers,
        }
        length = None
        if hasattr(data, "__len__") and not isinstance(data, IterableDataset):
            length = len(cast(Sized, data))
        if length is not None:
            self._sampler = ShardedSampler(
                length, group, seed=seed, shuffle=shuffle, multiple=micro_batch_size, drop=drop_last
            )
            if not self._sampler.total:
                need = micro_batch_size * group.size if drop_last else 1
                raise ConfigError(
                    f"training_data has {length} samples, and a micro-batch of {micro_batch_size} on each of "
                    f"{group.size} ranks takes {need} or more. Give more data, or a smaller micro-batch."
                )
            self.loader: DataLoader[Any] = DataLoader(data, sampler=self._sampler, **settings)  # type: ignore[arg-type]
        else:
            self._share = _Share(cast(Iterable[Any], data), group)
            self.loader = DataLoader(self._share, **settings)

    @property
    def dataset(self) -> Any:
        return self.loader.dataset if self._sampler is not None else self._share.stream

    @property
    def batch_size(self) -> int:
        return self.micro_batch_size

    def __len__(self) -> int:
        """Micro-batches in a whole epoch. Raises TypeError for a stream."""
        if self._sampler is None:
            raise TypeError("training_data is a stream: it has no length")
        share = self._sampler.total // self.group.size
        return share // self.micro_batch_size if self.loader.drop_last else -(-share // self.micro_batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass. Passes count by themselves without it."""
        self.epoch, self._samples, self._begun, self._resumed = epoch, 0, False, False

    def __iter__(self) -> Iterator[Any]:
        if self._begun and not self._resumed:
            self.epoch, self._samples = self.epoch + 1, 0
        self._begun, self._resumed = True, False
        if self._sampler is not None:
            self._sampler.epoch, self._sampler.start = self.epoch, self._samples
        else:
            self._share.start = self._samples
        for batch in self.loader:
            self._samples += self.micro_batch_size * self.group.size
            yield batch

    def state(self) -> dict[str, int]:
        """Where this is: the epoch and the samples that all ranks took from it, counted when a micro-batch came out."""
        return {"epoch": self.epoch, "samples": self._samples}

    def load(self, state: dict[str, int]) -> None:
        """Go on from there with the next pass."""
        self.epoch, self._samples = state["epoch"], state["samples"]
        self._begun = self._resumed = True
        if self._sampler is not None and self._samples >= self._sampler.total:
            self.set_epoch(self.epoch + 1)


class RepeatingLoader:
    """Pass after pass over a loader, without end. Raises ConfigError when a pass is empty."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader, self._pass = loader, iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        for _ in range(2):
            try:
                return next(self._pass)
            except StopIteration:
                self._pass = iter(self.loader)
        raise ConfigError("the data loader gives no batch at all. Give it data.")
