"""NvmeStore: round trips, order, full disks, files cut short, and what is left behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megazero.base.errors import MegazeroError, OffloadError
from megazero.zero.aligned import ALIGNMENT, AlignedPool, is_aligned, size_class
from megazero.zero.nvme import NvmeStore

PAGE = 4096


@pytest.fixture(params=["direct", "buffered"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NvmeStore]:
    """Small blocks, so that small tensors take several requests on several threads."""
    if request.param == "buffered":
        monkeypatch.setattr("megazero.zero.nvme.allows_direct_io", lambda folder: False)
    made = NvmeStore(tmp_path, block_size=PAGE, queue_depth=2, threads=3)
    if request.param == "direct" and not made.direct:
        made.close()
        pytest.skip("no direct IO on this file system")
    assert made.direct == (request.param == "direct")
    yield made
    made.close()


def values(nbytes: int, seed: int = 0, shift: int = 0) -> Tensor:
    """Random bytes (nbytes,), `shift` bytes off a page."""
    memory = AlignedPool(1).take(nbytes + shift, torch.uint8)[shift:]
    memory.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return memory


@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 5 * PAGE, 7 * PAGE + 13, 64 * PAGE])
def test_bytes_come_back(store: NvmeStore, nbytes: int, shift: int) -> None:
    tensor = values(nbytes, shift=shift)
    store.write("a", tensor).wait()
    out = torch.cat([values(nbytes, 1, shift=4 - shift), torch.full((8,), 9, dtype=torch.uint8)])
    transfer = store.read("a", out[:nbytes])
    transfer.wait()
    transfer.wait()
    assert transfer.done
    assert torch.equal(out[:nbytes], tensor)
    assert (out[nbytes:] == 9).all(), "bytes after the tensor were touched"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_types(store: NvmeStore, dtype: torch.dtype) -> None:
    tensor = torch.randn(100_003).mul(1000).to(dtype)
    buffer = store.buffer(100_003, dtype)
    assert is_aligned(buffer) and buffer.shape == (100_003,) and buffer.dtype == dtype
    buffer.copy_(tensor)
    store.write("x", buffer).wait()
    back = torch.empty_like(tensor)
    store.read("x", back).wait()
    assert torch.equal(back, tensor)


def test_a_read_sees_the_write_before_it_and_not_the_one_after(store: NvmeStore) -> None:
    rounds = [values(20 * PAGE + 5, seed) for seed in range(12)]
    outs = [torch.empty_like(rounds[0]) for _ in rounds]
    transfers = []
    for tensor, out in zip(rounds, outs, strict=True):
        transfers += [store.write("same", tensor), store.read("same", out)]
    transfers[-1].wait()
    assert all(transfer.done for transfer in transfers)
    for tensor, out in zip(rounds, outs, strict=True):
        assert torch.equal(out, tensor)


def test_many_names_in_flight(store: NvmeStore) -> None:
    tensors = {f"layers.{i}/exp_avg": values(PAGE * (i % 7) + i, i) for i in range(60)}
    for transfer in [store.write(name, tensor) for name, tensor in tensors.items()]:
        transfer.wait()
    outs = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    for transfer in [store.read(name, out) for name, out in outs.items()]:
        transfer.wait()
    assert all(torch.equal(outs[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("sizes", [(10 * PAGE, 3 * PAGE + 1), (3 * PAGE + 1, 10 * PAGE)])
def test_a_name_may_change_its_size(store: NvmeStore, sizes: tuple[int, int]) -> None:
    for size in sizes:
        store.write("a", values(size, size))
    out = torch.empty(sizes[1], dtype=torch.uint8)
    store.read("a", out).wait()
    assert torch.equal(out, values(sizes[1], sizes[1]))


def test_requests_have_block_size_times_queue_depth_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "pwrite", counting(sizes, os.pwrite))
    store = NvmeStore(tmp_path, block_size=PAGE + 1, queue_depth=4)  # a block is two pages
    sizes.clear()
    store.write("a", values(20 * PAGE + 1)).wait()
    expected = [8 * PAGE, 8 * PAGE, 4 * PAGE, PAGE] if store.direct else [8 * PAGE, 8 * PAGE, 4 * PAGE + 1]
    assert sizes == expected
    if store.direct:  # unaligned: block by block through the bounce block
        sizes.clear()
        store.write("b", values(5 * PAGE, shift=1)).wait()
        assert sizes == [2 * PAGE, 2 * PAGE, PAGE]
    store.close()


def counting(sizes: list[int], real: Callable[..., int]) -> Callable[..., int]:
    def pwrite(descriptor: int, view: memoryview, offset: int) -> int:
        sizes.append(len(view))
        return real(descriptor, view, offset)

    return pwrite


@pytest.mark.parametrize("shift", [0, 4])
def test_a_file_as_memory(store: NvmeStore, shift: int) -> None:
    first, second = values(9 * PAGE + 12, 1, shift), values(9 * PAGE + 12, 2, shift)
    store.write("a", first)
    mapped = store.mapped("a", 9 * PAGE // 4 + 3, torch.float32)  # waits for the write
    assert torch.equal(mapped.view(torch.uint8), first)
    mapped.view(torch.uint8)[PAGE - 3 : 5 * PAGE] = 5
    out = torch.empty_like(first)
    store.read("a", out).wait()
    expected = first.clone()
    expected[PAGE - 3 : 5 * PAGE] = 5
    assert torch.equal(out, expected)
    store.write("a", second).wait()
    assert torch.equal(mapped.view(torch.uint8), second)
    store.write("empty", torch.zeros(0))
    assert store.mapped("empty", 0, torch.float32).shape == (0,)


def test_what_is_not_there_is_not_mapped(store: NvmeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("a", torch.zeros(10_000)).wait()
    with pytest.raises(OffloadError, match="holds 40,000 bytes"):
        store.mapped("a", 10_000, torch.bfloat16)
    (path,) = store.folder.path.iterdir()
    os.truncate(path, 2 * PAGE)
    with pytest.raises(OffloadError, match=r"ends after 8,192 of the 40,000 bytes of 'a'.*last checkpoint"):
        store.mapped("a", 10_000, torch.float32)
    path.unlink()
    with pytest.raises(OffloadError, match=r"cannot map 'a' \(.*No such file"):
        store.mapped("a", 10_000, torch.float32)
    store.write("b", torch.zeros(10)).wait()
    full_after(monkeypatch, 0)
    store.write("b", torch.ones(10))
    with pytest.raises(OffloadError, match=r"'b' cannot be read back: its last write failed"):
        store.mapped("b", 10, torch.float32)


# what can go wrong


def test_a_full_disk_is_found_when_space_is_reserved(store: NvmeStore) -> None:
    store.write("small", values(PAGE)).wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * PAGE, before[1]))
    try:
        with pytest.raises(
            OffloadError, match=r"no room for 'moments' .*40,960 bytes are needed, [\d,]+ bytes are free"
        ):
            store.write("moments", values(10 * PAGE))
        with pytest.raises(
            OffloadError, match=r"36,864 bytes are needed.*Free the disk, name another folder, use more"
        ):
            store.write("small", values(10 * PAGE, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out = torch.empty(PAGE, dtype=torch.uint8)
    store.read("small", out).wait()  # what was there is still there
    assert torch.equal(out, values(PAGE))
    with pytest.raises(OffloadError, match="'moments' was never written"):
        store.read("moments", out)
    assert len(list(store.folder.path.iterdir())) == 1
    store.write("moments", values(10 * PAGE)).wait()


def test_where_nothing_can_be_reserved_the_write_itself_tells(
    store: NvmeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    store.write("a", values(10 * PAGE, 1)).wait()
    full_after(monkeypatch, 3)
    transfer = store.write("a", values(10 * PAGE, 2))
    for _ in range(2):
        with pytest.raises(
            OffloadError, match=r"writing 'a' \(40,960 bytes, .*No space left.*bytes are free; free the"
        ):
            transfer.wait()
    monkeypatch.undo()
    out = torch.zeros(10 * PAGE, dtype=torch.uint8)
    with pytest.raises(OffloadError, match=r"'a' cannot be read back: its last write failed.*last checkpoint"):
        store.read("a", out).wait()
    assert not out.any()
    store.write("a", values(10 * PAGE, 3))  # a whole write mends it
    store.read("a", out).wait()
    assert torch.equal(out, values(10 * PAGE, 3))


def full_after(monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    """A disk that takes so many pages more, part of a request if need be."""
    real, room, lock = os.pwrite, [pages * PAGE], threading.Lock()

    def pwrite(descriptor: int, view: memoryview, offset: int) -> int:
        with lock:
            if room[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = real(descriptor, view[: min(len(view), room[0])], offset)
            room[0] -= count
            return count

    monkeypatch.setattr(os, "pwrite", pwrite)


def test_short_writes_and_reads_are_carried_on(store: NvmeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: write(fd, view[:PAGE], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:PAGE]], at))
    tensor, out = values(30 * PAGE + 7), torch.empty(30 * PAGE + 7, dtype=torch.uint8)
    store.write("a", tensor)
    store.read("a", out).wait()
    assert torch.equal(out, tensor)


def test_a_write_that_makes_no_progress_ends(store: NvmeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: 0)
    with pytest.raises(OffloadError, match=r"takes no more than [\d,]+ of 40,960 bytes.*free the disk"):
        store.write("a", values(10 * PAGE)).wait()


def test_a_file_cut_short(store: NvmeStore) -> None:
    store.write("a", values(10 * PAGE)).wait()
    (path,) = store.folder.path.iterdir()
    os.truncate(path, 5 * PAGE + 100)
    with pytest.raises(OffloadError, match=r"ends after [\d,]+ of the 40,960 bytes of 'a'.*last checkpoint"):
        store.read("a", torch.empty(10 * PAGE, dtype=torch.uint8)).wait()
    path.unlink()
    with pytest.raises(OffloadError, match=r"reading 'a' .* failed: No such file.*state of the disk"):
        store.read("a", torch.empty(10 * PAGE, dtype=torch.uint8)).wait()


def test_a_folder_that_somebody_removes(store: NvmeStore) -> None:
    shutil.rmtree(store.folder.path)
    with pytest.raises(OffloadError, match=r"cannot make .* for 'a': No such file"):
        store.write("a", torch.zeros(10))


def test_other_sizes_and_names_are_refused(store: NvmeStore) -> None:
    store.write("a", torch.zeros(100))
    with pytest.raises(OffloadError, match=r"'a' holds 400 bytes in .*, not the 404 asked for"):
        store.read("a", torch.zeros(101))
    with pytest.raises(OffloadError, match="'b' was never written"):
        store.read("b", torch.zeros(100))
    assert issubclass(OffloadError, MegazeroError)


def test_an_error_of_the_disk_is_reported(store: NvmeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("a", torch.zeros(5000)).wait()

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OffloadError, match=r"reading 'a' \(20,000 bytes.*Input/output error.*system's log"):
        store.read("a", torch.zeros(5000)).wait()


# buffers


def test_buffers_are_reused_and_bounded(store: NvmeStore) -> None:
    first = store.buffer(10_000, torch.float32)
    address = first.data_ptr()
    store.release(first)
    again = store.buffer(20_001, torch.bfloat16)  # the same size class
    assert again.data_ptr() == address
    store.release(again)
    held = [store.buffer(10_000, torch.float32) for _ in range(9)]
    assert len({buffer.data_ptr() for buffer in held}) == 9
    assert store.pool.nbytes == 9 * size_class(40_000)
    for buffer in held:
        store.release(buffer)
    assert store.pool.nbytes == 4 * size_class(40_000)


def test_a_buffer_in_use_is_not_released(store: NvmeStore) -> None:
    buffer = store.buffer(1 << 22, torch.uint8)
    transfer = store.write("a", buffer)
    if not transfer.done:
        with pytest.raises(AssertionError, match=r"released while \['a'\]"):
            store.release(buffer)
    transfer.wait()
    store.release(buffer)
    with pytest.raises(AssertionError, match="has not lent"):
        store.release(buffer)


def test_size_classes() -> None:
    for nbytes in [0, 1, 4096, 4097, 33_000, 1 << 20, (1 << 20) + 1, 123_456_789]:
        size = size_class(nbytes)
        assert size >= nbytes and size % ALIGNMENT == 0 and size <= max(4096, nbytes * 1.125 + 4096)
        assert size_class(size) == size
    assert len({size_class(n) for n in range(1 << 20, 1 << 21, 999)}) <= 9
