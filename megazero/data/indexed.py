"""Token files: reader and streaming writer of Megatron's .bin/.idx pair, byte for byte.

    .bin   tokens of all sequences back to back, little-endian, no header
    .idx   "MMIDIDX\\0\\0" | version <Q 1 | dtype code <B | N <Q | D <Q | lengths int32[N] | byte offsets int64[N]
           | document indices int64[D]: 0, then the end (exclusive sequence index) of each document: D = documents + 1

Source: megatron/core/datasets/indexed_dataset.py of Megatron-LM; either program reads the other's files.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megazero.base.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}  # fmt: skip
_REMEDY = "Make the pair again with tools/preprocess_data.py, or copy both files again."


def optimal_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that Megatron would write for this vocabulary: uint16 below 65500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.idx")


class IndexedDataset:
    """A .bin/.idx pair, memory-mapped: opening reads the header, a sequence is read when asked for.

    `lengths` int32 [N] tokens; `pointers` int64 [N] bytes; `document_indices` int64 [D]; `dtype` of the tokens.
    Raises DataError when a file is missing, is no index, is cut short, or the two do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise DataError(f"data file {path} does not exist. {_missing_hint(self.prefix)}")
        self.dtype, count, documents = _read_header(idx_path(prefix))
        index = np.memmap(idx_path(prefix), mode="r", dtype=np.uint8)
        ends = HEADER.size + np.cumsum([0, 4 * count, 8 * count, 8 * documents])
        self.lengths: NDArray[np.int32] = index[ends[0] : ends[1]].view("<i4")
        self.pointers: NDArray[np.int64] = index[ends[1] : ends[2]].view("<i8")
        self.document_indices: NDArray[np.int64] = index[ends[2] : ends[3]].view("<i8")
        self._check_pair()
        size = bin_path(prefix).stat().st_size
        # numpy refuses to map an empty file
        self._bytes = np.memmap(bin_path(prefix), mode="r", dtype=np.uint8) if size else np.empty(0, np.uint8)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return len(self._bytes) // self.dtype.itemsize

    def __getitem__(self, sequence: int) -> NDArray:
        """Tokens of one sequence, a view of the file."""
        return self.get(sequence)

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> NDArray:
        """`length` tokens (default: all the rest) of a sequence from token `offset` on, a view of the file."""
        available = int(self.lengths[sequence]) - offset
        length = available if length is None else length
        assert offset >= 0 and 0 <= length <= available, (sequence, offset, length)
        start = int(self.pointers[sequence]) + offset * self.dtype.itemsize
        return self._bytes[start : start + length * self.dtype.itemsize].view(self.dtype)

    def check_index(self) -> None:
        """Raise DataError unless every sequence lies inside the .bin file. Reads the whole index."""
        stops = self.pointers + self.lengths.astype(np.int64) * self.dtype.itemsize
        bad = (self.lengths < 0) | (self.pointers < 0) | (stops > len(self._bytes))
        if bad.any():
            i = int(np.argmax(bad))
            raise DataError(
                f"{idx_path(self.prefix)} is damaged: sequence {i} has {self.lengths[i]} tokens at byte "
                f"{self.pointers[i]}, but {bin_path(self.prefix)} has {len(self._bytes)} bytes. {_REMEDY}"
            )

    def _check_pair(self) -> None:
        ends = self.document_indices
        if len(ends) == 0 or ends[0] != 0 or ends[-1] != len(self):
            shown = "none" if len(ends) == 0 else f"{ends[0]} … {ends[-1]}"
            raise DataError(
                f"{idx_path(self.prefix)} is damaged: document indices must run from 0 to its {len(self)} sequences, "
                f"they are {shown}. {_REMEDY}"
            )
        expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        actual = bin_path(self.prefix).stat().st_size
        if expected != actual:
            verb = "is cut short or does not match" if actual < expected else "does not match"
            raise DataError(
                f"{bin_path(self.prefix)} {verb} {idx_path(self.prefix)}: the index needs {expected} bytes "
                f"({expected // self.dtype.itemsize} tokens of {self.dtype}), the file has {actual}. {_REMEDY}"
            )


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """(dtype, number of sequences, length of the document indices) of an index whose size fits them."""
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    size = path.stat().st_size
    if not head.startswith(MAGIC):
        raise DataError(f"{path} is not an index of tokens: it starts with {head[:9]!r}, not {MAGIC!r}. {_REMEDY}")
    if len(head) < HEADER.size:
        raise DataError(f"{path} is cut short: its header needs {HEADER.size} bytes, the file has {size}. {_REMEDY}")
    _, version, code, count, documents = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(f"{path} has index version {version}; only version {VERSION} exists. {_REMEDY}")
    if code not in DTYPES:
        raise DataError(f"{path} has dtype code {code}; the codes are 1 to {max(DTYPES)}. {_REMEDY}")
    expected = HEADER.size + 12 * count + 8 * documents
    if size == expected + count and count:
        raise DataError(
            f"{path} carries one mode byte a sequence (a multimodal index: {count} bytes more than the {expected} of "
            "text); megazero reads text. Write the text without modes."
        )
    if size != expected:
        verb = "is cut short" if size < expected else "is too long"
        raise DataError(
            f"{path} {verb}: {count} sequences and {documents} document indices need {expected} bytes, "
            f"the file has {size}. {_REMEDY}"
        )
    return DTYPES[code], count, documents


def _missing_hint(prefix: str) -> str:
    """What the user may have meant by a prefix that has no files."""
    if prefix.endswith((".bin", ".idx")) and bin_path(prefix[:-4]).is_file():
        return f"Give the prefix without the suffix: {prefix[:-4]}"
    if bin_path(f"{prefix}_text_document").is_file():
        return f"tools/preprocess_data.py adds the key to the name: did you mean {prefix}_text_document?"
    return "Give the prefix of a .bin/.idx pair; tools/preprocess_data.py makes one."


class IndexedWriter:
    """Writes a .bin/.idx pair as a stream; the pair appears under its name only when `close` has finished.

    Use it as a context manager: leaving by an exception removes what was written. Memory: 12 bytes a sequence.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: DTypeLike) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        if not codes:
            raise DataError(
                f"{self.dtype} has no code in the .idx format; use one of {[str(d) for d in DTYPES.values()]}"
            )
        self._code = codes[0]
        self._lengths: list[NDArray[np.int32]] = []
        self._document_ends: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._count = 0
        self._temporary = Path(f"{self.prefix}.bin.{os.getpid()}.tmp")
        try:
            self._temporary.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise DataError(
                f"cannot write {bin_path(self.prefix)}: {error.strerror}. Choose a writable folder."
            ) from error

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def add_document(self, tokens: Sequence[int] | NDArray, sequence_lengths: Sequence[int] | None = None) -> None:
        """One document: its tokens, and the lengths of its sequences (default: one sequence)."""
        array = np.asarray(tokens, dtype=self.dtype)
        lengths = np.asarray([array.size] if sequence_lengths is None else sequence_lengths, dtype=np.int32)
        assert lengths.sum() == array.size
        self._append(array, lengths, np.asarray([len(lengths)]))

    def add_documents(self, tokens: NDArray, lengths: NDArray) -> None:
        """Many documents of one sequence each: tokens back to back, and the length of each."""
        array = np.ascontiguousarray(tokens, dtype=self.dtype)
        assert int(lengths.sum()) == array.size
        self._append(array, lengths.astype(np.int32), np.arange(1, len(lengths) + 1))

    def add_dataset(self, part: IndexedDataset) -> None:
        """All documents of another pair of the same dtype."""
        if part.dtype != self.dtype:
            raise DataError(
                f"cannot join {part.prefix} ({part.dtype}) to {self.prefix} ({self.dtype}): parts must have one dtype. "
                "Tokenize them with one tokenizer."
            )
        self._note(part.lengths, part.document_indices[1:])
        with bin_path(part.prefix).open("rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 22)

    def close(self) -> None:
        """Write the index and give both files their names, .bin first: who sees the .idx sees all."""
        self._sync(self._file)
        self._file.close()
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        documents = np.concatenate(self._document_ends)
        temporary = Path(f"{self.prefix}.idx.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(documents)))
            for array, kind in ((lengths, "<i4"), (pointers, "<i8"), (documents, "<i8")):
                file.write(np.ascontiguousarray(array, dtype=kind).data)
            self._sync(file)
        # An older pair loses its index first, so that no reader ever sees the old index with the new tokens.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._temporary, bin_path(self.prefix))
        os.replace(temporary, idx_path(self.prefix))

    def _append(self, tokens: NDArray, lengths: NDArray[np.int32], ends: NDArray) -> None:
        self._note(lengths, ends)
        self._file.write(tokens.data)

    def _note(self, lengths: NDArray[np.int32], ends: NDArray) -> None:
        """Remember sequences; `ends` counts from the first of them."""
        self._lengths.append(np.array(lengths, np.int32))
        self._document_ends.append(np.asarray(ends, np.int64) + self._count)
        self._count += len(lengths)

    @staticmethod
    def _sync(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())


def merge(parts: Sequence[str | os.PathLike[str]], prefix: str | os.PathLike[str]) -> None:
    """Join pairs of one dtype, in order, into one pair. Raises DataError when there are none or their types differ."""
    if not parts:
        raise DataError(f"nothing to join into {os.fspath(prefix)}: give at least one .bin/.idx prefix")
    datasets = [IndexedDataset(part) for part in parts]
    with IndexedWriter(prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset)
