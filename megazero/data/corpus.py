"""Text files as blocks of documents, cut into parts that can be read on their own.

    file              document                                      part
    .jsonl .json      a line: a JSON object, the text under a key   a byte range: the lines that begin in it
    .jsonl.gz .zst    the same, compressed                          the whole file
    .parquet          a row, the text in a column                   a range of row groups
    .txt (.gz .zst)   the file                                      the whole file

What cannot be read as a document is a `Problem` with its line, never an exception.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megazero.base.errors import DataError
from megazero.base.optional import require

FORMATS = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst")
BLOCK = 4 << 20
"""Bytes of text that are read, and tokenized, at a time."""


@dataclass(frozen=True)
class Part:
    """What one worker reads at a time."""

    path: str
    begin: int
    end: int
    """Bytes [begin, end) of a plain file, row groups of a .parquet file; (0, 1) is the whole of any other file."""
    size: int
    """Bytes on disk, for progress."""


@dataclass(frozen=True)
class Problem:
    """A line or row that is no document."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass
class Block:
    """Some documents, in order."""

    columns: list[list[str]]
    """columns[k][i]: the text of document i under key k."""
    problems: list[Problem]
    size: int
    """Bytes on disk that were read."""


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files of paths and globs (`**` too), sorted within a glob, each once. Raises DataError if there are none."""
    paths: dict[str, None] = {}
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"--input {pattern}: no such file, and no file matches it as a pattern.")
        for path in found:
            if os.path.isdir(path):
                raise DataError(f"--input {path} is a folder. Give its files, e.g. '{path}/*.jsonl'.")
            text_format(path)
            paths[path] = None
    return list(paths)


def text_format(path: str) -> tuple[str, str]:
    """(format, compression or "") by the file's name. Raises DataError for others."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in FORMATS or (kind == ".parquet" and compression):
        raise DataError(
            f"--input {path}: the format is told by the name, which must end in {', '.join(FORMATS)}, the first three "
            f"also with {' or '.join(COMPRESSIONS)}. Rename it."
        )
    return kind, compression


def plan_parts(paths: Sequence[str], keys: Sequence[str], part_bytes: int) -> list[Part]:
    """Parts of about `part_bytes` bytes in the order of the files, the same for any number of workers."""
    parts: list[Part] = []
    for path in paths:
        kind, compression = text_format(path)
        size = os.path.getsize(path)
        if kind == ".txt" and len(keys) > 1:
            raise DataError(f"{path} has no keys, but --json-keys names {len(keys)}: {' '.join(keys)}. Give one key.")
        if kind == ".parquet":
            parts += _parquet_parts(path, keys, part_bytes)
        elif kind == ".txt" or compression:
            parts.append(Part(path, 0, 1, size))
        else:
            edges = [*range(0, size, part_bytes), size] if size else []
            parts += [Part(path, a, b, b - a) for a, b in pairwise(edges)]
    return parts


def read_part(part: Part, keys: Sequence[str], block: int = BLOCK) -> Iterator[Block]:
    """The part's documents, about `block` bytes at a time. Raises DataError when a compressed file is damaged."""
    kind, compression = text_format(part.path)
    if kind == ".parquet":
        yield from _read_parquet(part, keys)
    elif kind == ".txt":
        yield _read_text(part, compression)
    elif compression:
        first, done = 1, 0
        for text, position in _whole_lines(_decompressed(part.path, compression, block)):
            yield _parse_lines(text, part.path, first, keys, position - done)
            first, done = first + text.count(b"\n"), position
    else:
        yield from _read_range(part, keys, block)


def _read_range(part: Part, keys: Sequence[str], block: int) -> Iterator[Block]:
    """Lines that begin in [begin, end) of a plain file."""
    with open(part.path, "rb") as file:
        if part.begin:
            file.seek(part.begin - 1)
            file.readline()
        position, first = file.tell(), None
        while position < part.end:
            text = file.read(min(block, part.end - position))
            if not text:
                return
            if not text.endswith(b"\n"):
                text += file.readline()
            found = _parse_lines(text, part.path, 0, keys, len(text))
            if found.problems:  # only now is it worth counting the lines before
                first = _count_lines(part.path, position)
                found = _parse_lines(text, part.path, first + 1, keys, len(text))
            yield found
            position += len(text)


def _count_lines(path: str, end: int) -> int:
    """Newlines in the first `end` bytes."""
    count = 0
    with open(path, "rb") as file:
        while end > 0 and (text := file.read(min(BLOCK, end))):
            count += text.count(b"\n")
            end -= len(text)
    return count


def _parse_lines(text: bytes, path: str, first: int, keys: Sequence[str], size: int) -> Block:
    """Documents of JSON lines; `first` is the number of the first line."""
    columns: list[list[str]] = [[] for _ in keys]
    problems: list[Problem] = []
    for number, line in enumerate(text.split(b"\n"), first):
        if not line or line.isspace():
            continue
        try:
            record = json.loads(line)
            texts = [_text_of(record, key) for key in keys]
        except (ValueError, RecursionError) as error:
            problems.append(Problem(path, number, _reason(error)))
            continue
        for column, value in zip(columns, texts, strict=True):
            column.append(value)
    return Block(columns, problems, size)


def _text_of(record: object, key: str) -> str:
    """The text under a key. Raises ValueError when there is none that can be tokenized."""
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is expected, this is {type(record).__name__}")
    if key not in record:
        raise ValueError(f"no key {key!r} among {sorted(record)[:8]}")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {type(value).__name__}, not text")
    if not value.isascii():
        value.encode()  # a lone half of a surrogate pair is legal JSON and no Unicode text
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeEncodeError):
        return "its text has a lone surrogate, which is not valid Unicode"
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8: {error.reason} at byte {error.start + 1} of the line"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_text(part: Part, compression: str) -> Block:
    if compression:
        text = b"".join(chunk for chunk, _ in _decompressed(part.path, compression, BLOCK))
    else:
        text = Path(part.path).read_bytes()
    try:
        return Block([[text.decode()]], [], part.size)
    except UnicodeDecodeError as error:
        line = 1 + text.count(b"\n", 0, error.start)
        return Block(
            [[]], [Problem(part.path, line, f"not valid UTF-8: {error.reason}; the file is skipped")], part.size
        )


def _whole_lines(chunks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The same bytes, cut after newlines."""
    rest, position = b"", 0
    for chunk, position in chunks:
        text = rest + chunk
        cut = text.rfind(b"\n") + 1
        rest = text[cut:]
        if cut:
            yield text[:cut], position
    if rest:
        yield rest, position


def _decompressed(path: str, compression: str, block: int) -> Iterator[tuple[bytes, int]]:
    """(decompressed bytes, position in the compressed file). Raises DataError when the file is damaged or cut short."""
    with open(path, "rb") as raw:
        try:
            if compression == ".gz":
                with gzip.GzipFile(fileobj=raw) as file:
                    while chunk := file.read(block):
                        yield chunk, raw.tell()
                return
            zstandard = require("zstandard", "zstandard", "to read .zst files")
            stream = None
            while chunk := raw.read(1 << 18):
                while chunk:
                    stream = stream or zstandard.ZstdDecompressor().decompressobj()
                    yield stream.decompress(chunk), raw.tell()
                    chunk = stream.unused_data
                    stream = None if stream.eof else stream
            if stream is not None:
                raise EOFError("it ends in the middle of a frame")
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is damaged or cut short: {error}. Copy or compress it again.") from error
        except Exception as error:  # zstandard's own error type exists only once it is imported
            if type(error).__name__ != "ZstdError":
                raise
            raise DataError(f"{path} is damaged or cut short: {error}. Copy or compress it again.") from error


def _parquet_parts(path: str, keys: Sequence[str], part_bytes: int) -> list[Part]:
    """Runs of row groups; checks that the columns exist and hold text."""
    meta, schema = _open_parquet(path).metadata, _open_parquet(path).schema_arrow
    for key in keys:
        if key not in schema.names or not any(name in str(schema.field(key).type) for name in ("string", "utf8")):
            columns = dict(zip(schema.names, map(str, schema.types), strict=True))
            raise DataError(f"{path} has no column of text named {key!r}; its columns are {columns}. Set --json-keys.")
    disk, rows = os.path.getsize(path), max(meta.num_rows, 1)
    parts, begin, held = [], 0, 0
    for group in range(meta.num_row_groups):
        held += meta.row_group(group).num_rows
        size = disk * held // rows
        if size >= part_bytes or group == meta.num_row_groups - 1:
            parts.append(Part(path, begin, group + 1, size))
            begin, held = group + 1, 0
    return parts


def _read_parquet(part: Part, keys: Sequence[str]) -> Iterator[Block]:
    file = _open_parquet(part.path)
    groups = range(part.begin, part.end)
    row = 1 + sum(file.metadata.row_group(group).num_rows for group in range(part.begin))
    rows = max(sum(file.metadata.row_group(group).num_rows for group in groups), 1)
    for batch in file.iter_batches(batch_size=1024, row_groups=list(groups), columns=list(keys), use_threads=False):
        block = Block([[] for _ in keys], [], part.size * len(batch) // rows)
        for texts in zip(*(batch.column(key).to_pylist() for key in keys), strict=True):
            if None in texts:
                block.problems.append(Problem(part.path, row, f"row {row}: {keys[texts.index(None)]!r} is null"))
            else:
                for column, text in zip(block.columns, texts, strict=True):
                    column.append(text)
            row += 1
        yield block


def _open_parquet(path: str) -> Any:
    parquet = require("pyarrow.parquet", "pyarrow", "to read .parquet files")
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own error types exist only once it is imported
        raise DataError(f"{path} cannot be read as .parquet: {error}. Copy or write it again.") from error
