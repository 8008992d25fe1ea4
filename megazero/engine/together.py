"""Work that succeeds on all ranks or fails on all: no rank is left waiting in a collective that another never joins.

rank 0   action ok ──────┐                       ┌── raises "… (rank 1): no space left"
rank 1   action raises ──┴── gather outcomes ────┴── raises "… (rank 1): no space left"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from megazero.base.errors import CheckpointError, OffloadError
from megazero.parallel.collectives import gather_objects
from megazero.parallel.topology import AxisGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Together:
    """One task of a group. CheckpointError is raised for what a user can mend, RuntimeError for what only we can."""

    group: AxisGroup
    what: str
    """The task, to open each message: "saving iteration 10 in runs/a"."""
    advice: str
    """What to do about an error of the file system."""

    def all(self, action: Callable[[], T]) -> list[T]:
        """Do something on every rank; every rank gets all results, or the first error of any."""
        result, error = None, None
        try:
            result = action()
        except Exception as caught:  # noqa: BLE001 - raised below, on every rank
            error = self._translated(caught)
            error.__cause__ = caught
        outcomes = gather_objects((result, error), self.group)
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                self._raise(rank, error if rank == self.group.rank and error else failure)
        return [result for result, _ in outcomes]

    def first(self, action: Callable[[], T]) -> T:
        """Do something on the group's first rank; every rank gets its result, or its error."""
        results = self.all(action if self.group.rank == 0 else lambda: None)
        return results[0]  # type: ignore[return-value]

    @contextmanager
    def planned(self) -> Iterator[None]:
        """Around calls of torch.distributed.checkpoint, which raises the same on every rank: its errors become ours."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is a normal case
                yield
        except CheckpointException as failed:
            rank = min(failed.failures)
            error = failed.failures[rank][0]
            if not isinstance(error, Exception):  # a keyboard interrupt, say
                raise error from failed
            self._raise(rank, self._translated(error))

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, CheckpointError):
            return error
        if isinstance(error, OffloadError):
            return CheckpointError(str(error))
        if isinstance(error, OSError):
            return CheckpointError(f"{error}. {self.advice}")
        return RuntimeError(f"{type(error).__name__}: {error}")

    def _raise(self, rank: int, error: Exception) -> NoReturn:
        where = f" (rank {self.group.ranks[rank]})" if self.group.size > 1 else ""
        raise type(error)(f"{self.what}{where}: {error}") from error
