"""MANIFEST.json: size and sha256 of every other file of a checkpoint, so that damage is found before a byte is used.

    {"format": 1, "iteration": 1000, "files": {"state.json": {"size": 310, "sha256": "9f…"}, "weights/…": …}}

sha256 because it is in the standard library and fast where the CPU has the instructions (1.7 GB/s a thread; crc32
4.3, blake2b 0.9), and because file names are made from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megazero.base.errors import CheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = 1
"""Raised when an older megazero could no longer read what this one writes."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be. `size` in bytes."""

    size: int
    sha256: str


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write a small file and wait until the disk has it. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries (names, renames, deletions). Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any) -> bytes:
    """Readable JSON, in the order given."""
    return (json.dumps(value, indent=1) + "\n").encode()


def write_manifest(folder: Path, iteration: int | str, files: dict[str, FileRecord]) -> None:
    """Write `folder`/MANIFEST.json. `files` is keyed by path relative to the folder, with forward slashes."""
    records = {path: asdict(record) for path, record in sorted(files.items())}
    write_file(folder / MANIFEST, to_json({"format": FORMAT, "iteration": iteration, "files": records}))


def read_manifest(folder: Path, iteration: int | str) -> dict[str, FileRecord]:
    """The records of a checkpoint's files. Raises CheckpointError when the manifest is missing, damaged, of another
    iteration or of a newer format."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        found, of_iteration = content["format"], content["iteration"]
        files = {name: FileRecord(int(r["size"]), str(r["sha256"])) for name, r in content["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {MANIFEST}: it is not a whole checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{path} says format {found!r}; this megazero reads format {FORMAT}. Use a newer megazero"
        )
    if of_iteration != iteration:
        raise CheckpointError(
            f"{path} says iteration {of_iteration!r}, but the folder is that of iteration {iteration}"
        )
    return files


def verify_file(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError unless the file is there and its size and sha256 are those recorded."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.size:
                kind = "cut short" if size < record.size else "too long"
                raise CheckpointError(f"{path} is {kind}: {size} bytes, {MANIFEST} says {record.size}")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, though {MANIFEST} lists it") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if digest != record.sha256:
        raise CheckpointError(
            f"{path} is damaged: its sha256 {digest[:12]}… is not {record.sha256[:12]}… of {MANIFEST}"
        )
