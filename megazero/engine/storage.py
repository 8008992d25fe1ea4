"""One section of a checkpoint on disk, as storage under torch.distributed.checkpoint's stock planners. No pickle.

    weights/  tensors.json             name -> dtype, logical shape, boxes: offset, shape, file, first byte
              9f86d0…a08.safetensors   boxes of any tensors, in safetensors format; named by the sha256 of its bytes

The table says where each box is, so loading never parses a payload's header; the header makes each file readable by
itself, with entries such as `lm_head.weight[0:512, 0:64]`. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megazero.base.errors import CheckpointError
from megazero.engine.manifest import FileRecord, write_file
from megazero.engine.table import DTYPES, TABLE, StoredBox, StoredTensor, Table, dtype_name, table_bytes
from megazero.parallel.sharding import Box

PAYLOAD_BYTES = 256 << 20
"""A rank starts another payload file at about this size: threads and ranks then share the checking."""
_CHUNK_BYTES = 8 << 20  # hashed by one thread while another writes it
_SYNC_BYTES = 32 << 20  # written before a third thread starts to push it to the disk


class SectionWriter(StorageWriter):
    """Writes a section into an existing folder. Afterwards `files` holds, on the first rank, a record of each file."""

    def __init__(self, folder: Path, payload_bytes: int = PAYLOAD_BYTES) -> None:
        self.folder = folder
        self.payload_bytes = payload_bytes
        self.files: dict[str, FileRecord] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Part of the interface; a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Part of the interface; the folder is there already."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return replace(plan, storage_data=_coverage(plan.items))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Check that the boxes of each tensor tile it. The planner has refused overlaps, but silently drops a box that
        another rank has too, and in a single process does not ask for completeness."""
        offered: Counter[str] = sum((Counter(plan.storage_data) for plan in plans), Counter())
        kept = _coverage(item for plan in plans for item in plan.items)
        kinds: dict[str, set[Any]] = defaultdict(set)
        for plan in plans:
            for item in plan.items:
                kinds[item.index.fqn].add((tuple(_data(item).size), _data(item).properties.dtype))
        for name, found in kinds.items():
            assert len(found) == 1, f"internal error: ranks disagree in shape or dtype of {name}: {found}"
            logical = math.prod(next(iter(found))[0])
            assert offered[name] == kept[name] == logical, (
                f"internal error: the pieces of {name} hold {offered[name]} elements over all ranks ({kept[name]} "
                f"without repeated boxes), the tensor {logical}: each element must be saved by exactly one rank"
            )
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        try:
            for items in _payloads(plan.items, self.payload_bytes):
                results += self._write_payload(items, planner)
        except OSError as error:  # a failed write does not say where
            raise OSError(error.errno, error.strerror, str(self.folder)) from error
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_payload(self, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        header, starts = _header(items)
        path = self.folder / f".{uuid.uuid4().hex}"
        digest = hashlib.sha256()
        with path.open("xb") as file:
            blocks = (_bytes_of(planner.resolve_data(item)) for item in items)
            _write_and_hash(file, digest, header, blocks)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        name = f"{digest.hexdigest()}.safetensors"
        path.replace(self.folder / name)
        record = FileRecord(size, digest.hexdigest())
        return [
            WriteResult(item.index, _nbytes(item), (name, start, record))
            for item, start in zip(items, starts, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written: the table."""
        places = {}
        for result in (result for of_rank in results for result in of_rank):
            file, start, self.files[file] = result.storage_data
            places[result.index] = (file, start)
        table: Table = {}
        for name, tensor in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(tensor, TensorStorageMetadata)
            boxes = (
                StoredBox(tuple(c.offsets), tuple(c.sizes), *places[MetadataIndex(name, c.offsets)])
                for c in tensor.chunks
            )
            table[name] = StoredTensor(tensor.properties.dtype, tuple(tensor.size), tuple(boxes))
        self.files[TABLE] = write_file(self.folder / TABLE, table_bytes(table))


class SectionReader(StorageReader):
    """Reads boxes of a section into the memory that the planner names, converting the dtype. `table` is the section's;
    its files have been checked."""

    def __init__(self, folder: Path, table: Table) -> None:
        self.folder = folder
        self.table = table
        self.places = {MetadataIndex(name, box.offset): box for name, entry in table.items() for box in entry.boxes}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Part of the interface; a reader serves one folder."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Part of the interface; the table is there already."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return (Path(checkpoint_id) / TABLE).is_file()

    def read_metadata(self) -> Metadata:
        tensors = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=entry.dtype),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in entry.boxes],
            )
            for name, entry in self.table.items()
        }
        return Metadata(dict(tensors))

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.places[item.storage_index].file].append(item)
        for name, items in by_file.items():
            path = self.folder / name
            try:
                with path.open("rb") as file:
                    for item in sorted(items, key=lambda item: self.places[item.storage_index].start):
                        target = planner.resolve_tensor(item)
                        self._read(file, item, target)
                        planner.commit_tensor(item, target)
            except EOFError:
                raise CheckpointError(f"{path} was cut short while it was read") from None
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, file: BinaryIO, item: ReadItem, target: Tensor) -> None:
        """Fill `target` with a region of a stored box: straight into its memory where the bytes lie alike, else by way
        of one buffer that spans the region."""
        place, dtype = self.places[item.storage_index], self.table[item.storage_index.fqn].dtype
        strides = [math.prod(place.shape[dim + 1 :]) for dim in range(len(place.shape))]
        first = sum(at * stride for at, stride in zip(item.storage_offsets, strides, strict=True))
        span = 1 + sum((length - 1) * stride for length, stride in zip(item.lengths, strides, strict=True))
        file.seek(place.start + first * dtype.itemsize)
        alike = target.is_cpu and target.dtype == dtype and target.is_contiguous() and span == target.numel()
        buffer = target if alike else torch.empty(span, dtype=dtype)
        memory = _bytes_of(buffer)
        if file.readinto(memory) != len(memory):  # type: ignore[attr-defined]
            raise EOFError
        if not alike:
            target.copy_(buffer.as_strided(tuple(item.lengths), strides))


def read_tensor(folder: Path, stored: StoredTensor) -> Tensor:
    """The whole logical tensor, in the type it is stored in. For tools: a run reads its boxes with SectionReader.

    Raises CheckpointError when a file cannot be read.
    """
    whole = torch.empty(stored.shape, dtype=stored.dtype)
    for box in stored.boxes:
        part = torch.empty(box.shape, dtype=stored.dtype)
        memory = _bytes_of(part)
        path = folder / box.file
        try:
            with path.open("rb") as file:
                file.seek(box.start)
                read = file.readinto(memory)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        if read != len(memory):
            raise CheckpointError(f"{path} was cut short while it was read")
        Box(box.offset, box.shape).of(whole).copy_(part)
    return whole


def _data(item: WriteItem) -> Any:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    return item.tensor_data


def _nbytes(item: WriteItem) -> int:
    nbytes: int = math.prod(_data(item).chunk.sizes) * _data(item).properties.dtype.itemsize
    return nbytes


def _coverage(items: Iterable[WriteItem]) -> Counter[str]:
    """Elements in these boxes by tensor name."""
    covered: Counter[str] = Counter()
    for item in items:
        covered[item.index.fqn] += math.prod(_data(item).chunk.sizes)
    return covered


def _payloads(items: list[WriteItem], limit: int) -> Iterator[list[WriteItem]]:
    """Items file by file, wide dtypes first: each then starts at a multiple of its own size without padding."""
    batch: list[WriteItem] = []
    size = 0
    for item in sorted(items, key=lambda item: -_data(item).properties.dtype.itemsize):
        if batch and size + _nbytes(item) > limit:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += _nbytes(item)
    if batch:
        yield batch


def _header(items: list[WriteItem]) -> tuple[bytes, list[int]]:
    """The safetensors header of a file with these boxes, and each box's first byte in the file."""
    entries: dict[str, Any] = {}
    ends = [0]
    for item in items:
        offset, shape = _data(item).chunk.offsets, list(_data(item).chunk.sizes)
        ends.append(ends[-1] + _nbytes(item))
        span = ", ".join(f"{start}:{start + length}" for start, length in zip(offset, shape, strict=True))
        dtype = DTYPES[dtype_name(_data(item).properties.dtype)]
        entries[f"{item.index.fqn}[{span}]"] = {"dtype": dtype, "shape": shape, "data_offsets": ends[-2:]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + end for end in ends[:-1]]


def _bytes_of(tensor: Any) -> memoryview:
    """The bytes of a tensor, row-major; its own memory when it is contiguous and on the CPU."""
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _write_and_hash(file: BinaryIO, digest: Any, header: bytes, blocks: Iterable[memoryview]) -> None:
    """Write header and blocks. Meanwhile other threads hash each chunk and push what is written to the disk: 1.3 times
    the speed of doing so afterwards. Every sync's result is looked at, because the system reports a failure only once.
    """
    digest.update(header)
    file.write(header)
    unsynced = 0
    with ThreadPoolExecutor(max_workers=2) as helpers:
        synced: ThreadFuture[None] | None = None
        for block in blocks:
            for start in range(0, len(block), _CHUNK_BYTES):
                chunk = block[start : start + _CHUNK_BYTES]
                hashed = helpers.submit(digest.update, chunk)
                file.write(chunk)
                hashed.result()
                unsynced += len(chunk)
            if unsynced >= _SYNC_BYTES:
                if synced is not None:
                    synced.result()
                file.flush()
                synced = helpers.submit(os.fsync, file.fileno())
                unsynced = 0
        if synced is not None:
            synced.result()
