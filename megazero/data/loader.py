"""Samples in order, dealt to the data-parallel ranks step by step.

    a global batch of 8, micro-batch 2, dp 2:    samples 0 1 | 2 3 | 4 5 | 6 7
                                                 rank    0     1     0     1
                                                 micro-step  0           1

Each micro-step takes the next mbs · dp samples, rank r the r-th mbs of them, as Megatron does: which samples a step
sees never depends on the layout. A position is one number, the samples consumed. The next step is read while this one
trains.
Source: megatron/training/datasets/data_samplers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from megazero.base.errors import ConfigError
from megazero.data.batch import Batch, stack
from megazero.data.sample import SampleSource


class GlobalBatches(Iterator[list[Batch]]):
    """Iterator over steps; each item is the list of this rank's micro-batches of one global batch.

    It ends when fewer than global_batch_size samples are left. An error in reading is raised by `next`.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
        part: Tensor | None = None,
        pin_memory: bool = False,
    ) -> None:
        """`part`: int64, the places of the tokens to keep of each sample, ascending; None keeps all. `pin_memory`: read
        into page-locked memory, for GPUs.

        Raises ConfigError unless global_batch_size is a multiple of micro_batch_size · dp_size.
        """
        self.dataset = dataset
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.consumed_samples = consumed_samples
        """Samples before the next item, over all ranks: what a resumed run passes to begin there."""
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"global batch of {global_batch_size} samples is not a multiple of micro-batch-size · data-parallel "
                f"size = {micro_batch_size} · {dp_size}. Change one of them."
            )
        self.part, self.pin_memory = part, pin_memory
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: Future[list[Batch]] | None = None

    def __next__(self) -> list[Batch]:
        if self.consumed_samples + self.global_batch_size > len(self.dataset):
            self.close()
            raise StopIteration
        now = self._ahead or self._reader.submit(self._read, self.consumed_samples)
        self._ahead = None
        batches = now.result()
        self.consumed_samples += self.global_batch_size
        if self.consumed_samples + self.global_batch_size <= len(self.dataset):
            self._ahead = self._reader.submit(self._read, self.consumed_samples)
        return batches

    def close(self) -> None:
        """End the reading thread. Called by itself at the end of the samples."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _read(self, first: int) -> list[Batch]:
        stride = self.micro_batch_size * self.dp_size
        batches = []
        for step in range(self.global_batch_size // stride):
            begin = step * stride + self.dp_rank * self.micro_batch_size
            places = range(begin, begin + self.micro_batch_size)
            batch = stack([self.dataset[first + place] for place in places], places)
            if self.part is not None:
                batch = batch.part(self.part)
            batches.append(batch.pin_memory() if self.pin_memory else batch)
        return batches
