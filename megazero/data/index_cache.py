"""Arrays on disk, keyed by content: built once a node, then memory-mapped by every rank.

An entry is a folder of .npy files that is written beside and renamed, so it is whole or absent. Ranks of a node take
turns by a file lock: the first builds, the others find it. Nothing is communicated, so disks may be shared or each
node's own; where locks do not work, ranks build the same entry at once and the first rename wins.
A folder that cannot be written costs memory, not the run: each rank then keeps its own arrays.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megazero.base.log import Log

Arrays = dict[str, NDArray]


class IndexCache:
    """Entries in one folder. `folder` None keeps everything in memory."""

    def __init__(self, folder: str | os.PathLike[str] | None, log: Log | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._log = log or Log()

    def get(self, key: dict[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays of `key` (JSON-able; all that their content depends on), built unless they are there."""
        if self.folder is None:
            return build()
        name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
        entry = self.folder / name
        arrays = _open(entry)
        if arrays is not None:
            return arrays
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _turn(self.folder / ".lock"):
                arrays = _open(entry)
                if arrays is None:
                    arrays = build()
                    _write(entry, key, arrays)
        except OSError as error:
            self._log.warn_once(
                f"cannot write the index cache {self.folder} ({error.strerror}): indices are built in memory by every "
                "rank. Set --data-cache-path to a writable folder to build them once."
            )
            return arrays if arrays is not None else build()
        return _open(entry) or arrays


def _open(entry: Path) -> Arrays | None:
    """Memory-mapped arrays of a finished entry; None when it is absent or damaged (it is then built again)."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text())
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in manifest["shapes"]}
    except (OSError, ValueError, KeyError):
        return None
    intact = all(list(arrays[name].shape) == shape for name, shape in manifest["shapes"].items())
    return arrays if intact else None


def _write(entry: Path, key: dict[str, Any], arrays: Arrays) -> None:
    temporary = entry.with_name(f"{entry.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        manifest = {"key": key, "shapes": {name: list(array.shape) for name, array in arrays.items()}}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if entry.exists() and _open(entry) is None:
            shutil.rmtree(entry)
        with contextlib.suppress(FileExistsError):
            _rename(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
    """Rename a folder; FileExistsError when another process made `target` first."""
    try:
        os.rename(source, target)
    except OSError:
        if target.exists():
            raise FileExistsError(target) from None
        raise


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold a file lock, which the system drops when its holder dies."""
    with path.open("a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
