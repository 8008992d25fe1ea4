"""Flat tensors of one rank as files of one folder, moved in the background with direct IO.

    write(name, tensor) ─► reserve space ─► queue of `name` ─► IO threads: pwrite of block_size × queue_depth bytes
    read(name, out)     ──────────────────► queue of `name` ─► IO threads: preadv …      ─► Transfer.wait()

The kernel cuts a direct request into device commands and has all of them in flight at once, so `queue_depth` needs no
threads of its own; `threads` requests run side by side. Transfers of one name keep their order. What O_DIRECT cannot
take (memory off a page, the last bytes of a tensor) goes by way of one bounce block a thread. Where the file system
has no direct IO, transfers are buffered, and their pages are dropped from the cache afterwards.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from megazero.base.errors import OffloadError
from megazero.zero.aligned import ALIGNMENT, AlignedPool, aligned_bytes, is_aligned, round_up
from megazero.zero.folder import FULL, PrivateFolder, allows_direct_io, free_space, reserve

Jobs = SimpleQueue[Callable[[], None] | None]


@dataclass
class _File:
    """What is known of one name."""

    path: Path
    nbytes: int = 0
    """Bytes of the tensor last written; the file is padded to whole pages."""
    reserved: int = 0
    broken: str | None = None
    """Why the content cannot be trusted; None once a whole write has succeeded."""
    queue: deque[Transfer] = field(default_factory=deque)
    """Transfers in order; the first one is running."""


class Transfer:
    """One tensor on its way to or from its file. The tensor must live, and not change, until `wait` returns."""

    def __init__(self, store: NvmeStore, name: str, file: _File, tensor: Tensor, *, write: bool) -> None:
        self.store, self.name, self.file, self.tensor, self.write = store, name, file, tensor, write
        self.nbytes = tensor.numel() * tensor.element_size()
        self._error: Exception | None = None
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._next = 0  # first byte that no thread has taken
        self._running = 0  # threads at work
        self._descriptor = -1

    def wait(self) -> None:
        """Until all bytes have moved. Raises OffloadError when they could not; may be called again."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Until its memory is no longer in use; says nothing of its success."""
        self._done.wait()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    # on the IO threads

    def begin(self) -> None:
        """Open the file, call more threads if there is work for them, and take part."""
        try:
            if not self.write and self.file.broken is not None:
                raise unreadable(self.name, self.file.broken)
            flags = (os.O_WRONLY if self.write else os.O_RDONLY) | (os.O_DIRECT if self.store.direct else 0)
            self._descriptor = os.open(self.file.path, flags)
        except (OSError, OffloadError) as error:
            self._end(error)
            return
        spans = -(-self.nbytes // self.store.span)
        self._running = max(1, min(self.store.threads, spans))
        for _ in range(self._running - 1):
            self.store.jobs.put(self.take_part)
        self.take_part()

    def take_part(self) -> None:
        """Move spans until none is left or one has failed."""
        try:
            while (start := self._take()) is not None:
                self._move(start, min(start + self.store.span, self.nbytes))
        except Exception as error:  # noqa: BLE001 - raised again by wait()
            with self._lock:
                self._error = self._error or error
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            self._close()

    def _take(self) -> int | None:
        with self._lock:
            start = self._next
            if self._error is not None or start >= self.nbytes:
                return None
            self._next += self.store.span
            return start

    def _move(self, start: int, stop: int) -> None:
        """Bytes [start, stop) of the tensor: whole pages straight from its memory, if that is aligned, the rest by way
        of the bounce block. `start` is a multiple of a page."""
        part = self.tensor.view(torch.uint8)[start:stop]
        if not self.store.direct:
            self._all(part, start)
            return
        pages = part.numel() // ALIGNMENT * ALIGNMENT if is_aligned(part) else 0
        if pages:
            self._all(part[:pages], start)
        while pages < part.numel():
            bounce = self.store.bounce()
            rest = part[pages : pages + bounce.numel()]
            padded = bounce[: round_up(rest.numel())]
            if self.write:
                padded[: rest.numel()].copy_(rest)
                padded[rest.numel() :].zero_()
            self._all(padded, start + pages)
            if not self.write:
                rest.copy_(padded[: rest.numel()])
            pages += rest.numel()

    def _all(self, memory: Tensor, offset: int) -> None:
        """One request, or several where the system moves less than was asked."""
        view, moved = memory.numpy().data, 0
        while moved < len(view):
            if self.write:
                count = os.pwrite(self._descriptor, view[moved:], offset + moved)
            else:
                count = os.preadv(self._descriptor, [view[moved:]], offset + moved)
            if self.store.direct and moved + count < len(view):
                count -= count % ALIGNMENT  # go on at a page
            if count <= 0:
                raise self._stuck(offset + moved)
            moved += count

    def _close(self) -> None:
        try:
            if not self.store.direct:
                if self.write:
                    os.fdatasync(self._descriptor)  # only clean pages can be dropped; and it tells of failed writes
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self._error = self._error or error
        finally:
            os.close(self._descriptor)
        self._end(self._error)

    def _end(self, error: Exception | None) -> None:
        if isinstance(error, OSError):
            error = self._explained(error)
        if self.write:
            self.file.broken = None if error is None else f"its last write failed ({error})"
        self._error = error
        self.store._finished(self)

    def _stuck(self, at: int) -> OffloadError:
        if self.write:
            remedy = f"{free_space(self.file.path.parent)}; free the disk or name another folder"
            return OffloadError(f"{self.file.path} takes no more than {at:,} of {self.nbytes:,} bytes. {remedy}")
        return cut_short(self.file.path, at, self.nbytes, self.name)

    def _explained(self, error: OSError) -> OffloadError:
        if error.errno in FULL:
            remedy = f"{free_space(self.file.path.parent)}; free the disk or name another folder"
        else:
            remedy = "Look at the system's log for the state of the disk"
        action = "writing" if self.write else "reading"
        text = f"{action} {self.name!r} ({self.nbytes:,} bytes, {self.file.path}) failed: {error.strerror or error}. "
        explained = OffloadError(text + remedy)
        explained.__cause__ = error
        return explained


class NvmeStore:
    """Tensors of this rank, by name, in a folder of their own below `folder`. Not for sharing between processes.

    Args:
        folder: must exist; a subfolder is made, and is removed by `close`, when the store is collected, and at exit.
            What killed processes have left there is removed at start.
        block_size: bytes, rounded up to whole pages. With `queue_depth`: bytes asked for in one request.
        threads: requests in flight side by side.
        buffers: how many idle buffers of one size `release` keeps.
        pin_memory: buffers are page-locked, for copies to and from a GPU; without a GPU it says nothing.
        setting: how messages call the folder.

    Raises:
        ConfigError: the folder is missing, is no folder, or cannot be written to.
        OffloadError: the disk is full or fails.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        block_size: int = 1 << 20,
        queue_depth: int = 8,
        threads: int = 1,
        buffers: int = 4,
        pin_memory: bool = False,
        setting: str = "nvme_path (--offload-optimizer-path)",
    ) -> None:
        assert min(block_size, queue_depth, threads, buffers) >= 1
        self.block_size = round_up(block_size)
        self.span = self.block_size * queue_depth
        self.threads = threads
        self.folder = PrivateFolder(Path(folder), setting)
        try:
            self.direct = allows_direct_io(self.folder.path)
            """Whether transfers pass the page cache by."""
        except OffloadError:
            self.folder.remove()
            raise
        self.pool = AlignedPool(buffers, pin_memory and torch.cuda.is_available())
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self.jobs: Jobs = SimpleQueue()
        workers = [threading.Thread(target=_serve, args=(self.jobs,), daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        self._finalizer = weakref.finalize(self, _shut_down, self.jobs, workers, self.folder)

    def write(self, name: str, tensor: Tensor) -> Transfer:
        """Store `tensor` (n,), replacing what `name` held. Space is reserved before this returns.

        Raises OffloadError when the disk has no room.
        """
        self._check(tensor)
        size = round_up(tensor.numel() * tensor.element_size())
        with self._lock:
            file = self._files.get(name)
            new = file is None
            if file is None:
                file = _File(self.folder.path / f"{len(self._files):06d}")
            if new or size > file.reserved:
                reserve(file.path, file.reserved, size, name)
                file.reserved = size
            self._files[name] = file
        return self._enqueue(Transfer(self, name, file, tensor, write=True))

    def read(self, name: str, out: Tensor) -> Transfer:
        """Fill `out` (n,) with the bytes that the last `write` of `name` stored. Values are undefined until `wait`.

        Raises OffloadError, here or in `wait`, when there are no such bytes.
        """
        self._check(out)
        file = self._written(name, out.numel() * out.element_size())
        return self._enqueue(Transfer(self, name, file, out, write=False))

    def mapped(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """The file of `name` as memory (numel,), shared: what is written to it is in the file. Waits for transfers, and
        is not for use during one. For checkpoints, which touch everything once: pages come as needed and may go again.

        Raises OffloadError when the file cannot be trusted or has another size.
        """
        file = self._written(name, numel * dtype.itemsize)
        with self._lock:
            running = list(file.queue)
        for transfer in running:
            transfer.finish()
        if file.broken is not None:
            raise unreadable(name, file.broken)
        if file.nbytes == 0:
            return torch.empty(0, dtype=dtype)
        try:
            descriptor = os.open(file.path, os.O_RDWR)
            try:
                if (size := os.fstat(descriptor).st_size) < file.nbytes:  # touching what is not there ends a process
                    raise cut_short(file.path, size, file.nbytes, name)
                memory = mmap.mmap(descriptor, file.nbytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise OffloadError(f"cannot map {name!r} ({file.path}): {error.strerror or error}") from error
        return torch.frombuffer(memory, dtype=dtype)

    def _written(self, name: str, nbytes: int) -> _File:
        with self._lock:
            file = self._files.get(name)
        if file is None:
            raise OffloadError(f"{name!r} was never written to {self.folder.path}")
        if nbytes != file.nbytes:
            raise OffloadError(f"{name!r} holds {file.nbytes:,} bytes in {file.path}, not the {nbytes:,} asked for")
        return file

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A page-aligned CPU tensor (numel,) from the pool, values undefined; it needs no bounce block."""
        with self._lock:
            return self.pool.take(numel, dtype)

    def release(self, tensor: Tensor) -> None:
        """Give a tensor of `buffer` back; its transfers must be over."""
        with self._lock:
            busy = [t.name for file in self._files.values() for t in file.queue if _overlap(t.tensor, tensor)]
            assert not busy, f"internal error: a buffer was released while {busy} was being moved"
            self.pool.give_back(tensor)

    def close(self) -> None:
        """Wait for all transfers, whether they succeed or not, and remove the files. May be called again."""
        while True:
            with self._lock:
                running = [transfer for file in self._files.values() for transfer in file.queue]
            if not running:
                break
            for transfer in running:
                transfer.finish()
        self._finalizer()
        self._files.clear()
        self.pool.clear()

    # between the callers and the IO threads

    def _check(self, tensor: Tensor) -> None:
        assert self._finalizer.alive, "internal error: the store is closed"
        assert tensor.is_cpu and tensor.dim() == 1 and tensor.is_contiguous(), (
            f"internal error: only flat contiguous CPU tensors are stored, not {tuple(tensor.shape)} on {tensor.device}"
        )

    def _enqueue(self, transfer: Transfer) -> Transfer:
        with self._lock:
            if transfer.write:
                transfer.file.nbytes = transfer.nbytes
            transfer.file.queue.append(transfer)
            first = len(transfer.file.queue) == 1
        if first:
            self.jobs.put(transfer.begin)
        return transfer

    def _finished(self, transfer: Transfer) -> None:
        with self._lock:
            queue = transfer.file.queue
            assert queue.popleft() is transfer
            transfer._done.set()
            following = queue[0] if queue else None
        if following is not None:
            self.jobs.put(following.begin)

    def bounce(self) -> Tensor:
        """The calling thread's aligned block (block_size bytes); it takes no memory before it is used."""
        if not hasattr(self._local, "block"):
            self._local.block = aligned_bytes(self.block_size)
        block: Tensor = self._local.block
        return block


def unreadable(name: str, why: str) -> OffloadError:
    """The error of asking for what a failed write has left."""
    return OffloadError(f"{name!r} cannot be read back: {why}. Resume from the last checkpoint")


def cut_short(path: Path, at: int, nbytes: int, name: str) -> OffloadError:
    """The error of a file with fewer bytes than were written."""
    return OffloadError(
        f"{path} ends after {at:,} of the {nbytes:,} bytes of {name!r}: something else has cut it short. Resume from "
        f"the last checkpoint"
    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _serve(jobs: Jobs) -> None:
    """An IO thread. It knows the queue only, so that a forgotten store can be collected."""
    while (job := jobs.get()) is not None:
        job()
        del job


def _shut_down(jobs: Jobs, workers: list[threading.Thread], folder: PrivateFolder) -> None:
    if not folder.ours():
        return  # a forked child, whose parent goes on
    for _ in workers:
        jobs.put(None)
    for worker in workers:
        if worker is not threading.current_thread():
            worker.join()
    folder.remove()
