"""A folder on a fast disk that belongs to one process, and is gone when that process is.

    <nvme_path>/megazero-offload-<host>-<pid>-XXXXXXXX/    locked (flock) as long as its process lives

A killed process cannot remove its folder, but the kernel drops its lock: the next start removes every folder of this
pattern that it can lock. A lock says more than a pid, which means nothing to another container on the same disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
from pathlib import Path

import torch

from megazero.base.errors import ConfigError, OffloadError
from megazero.zero.aligned import ALIGNMENT, aligned_bytes

_PREFIX = "megazero-offload-"
_NAME = re.compile(_PREFIX + r"[\w.]+-\d+-[a-z0-9_]{8}")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system answers when there is no more room: on the disk, for this user, in this file."""
_NO_DIRECT_IO = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
_CANNOT_RESERVE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


class PrivateFolder:
    """Makes and locks a subfolder of `parent`, after removing those of dead processes. `setting` is what messages call
    the parent. Raises ConfigError when the parent does not serve."""

    def __init__(self, parent: Path, setting: str) -> None:
        try:
            mode = parent.stat().st_mode
        except OSError as error:
            raise ConfigError(
                f"{setting} {parent} cannot be found ({error.strerror or error}). Mount the disk, or make the folder "
                f"on every node with `mkdir -p {parent}`"
            ) from error
        if not stat.S_ISDIR(mode):
            raise ConfigError(f"{setting} {parent} is a file; name a folder on a fast local disk")
        _remove_leftovers(parent)
        self.path, self._lock = _make(parent, setting)
        self._pid = os.getpid()

    def ours(self) -> bool:
        """False in a forked child."""
        return os.getpid() == self._pid

    def remove(self) -> None:
        """The folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _make(parent: Path, setting: str) -> tuple[Path, int]:
    host = re.sub(r"[^\w.]", "_", socket.gethostname())
    try:
        while True:
            path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{host}-{os.getpid()}-", dir=parent))
            lock = _locked(path, wait=True)
            if lock is not None:
                return path, lock
    except OSError as error:
        raise ConfigError(
            f"{setting} {parent} cannot be written to ({error.strerror or error}); name a folder that this user owns, "
            f"on a fast local disk with free space"
        ) from error


def _remove_leftovers(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            lock = _locked(path, wait=False)
        except OSError:  # in use, or another user's
            continue
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _locked(path: Path, *, wait: bool) -> int | None:
    """A descriptor of the folder that holds its lock, or None if the folder was removed before it was locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if not wait:
            os.close(descriptor)
            raise
        return descriptor  # no such locks here: nobody can lock it, so nobody takes it for a dead one's
    if os.fstat(descriptor).st_nlink == 0 or not path.exists():
        os.close(descriptor)
        return None
    return descriptor


def allows_direct_io(folder: Path) -> bool:
    """Whether the file system of `folder` takes O_DIRECT: one page is written and read back."""
    path, page = folder / "probe", aligned_bytes(ALIGNMENT).fill_(7)
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        view, back = page.numpy().data, aligned_bytes(ALIGNMENT)
        if os.pwrite(descriptor, view, 0) != ALIGNMENT:
            return False
        return os.preadv(descriptor, [back.numpy().data], 0) == ALIGNMENT and torch.equal(page, back)
    except OSError as error:
        if error.errno in _NO_DIRECT_IO:
            return False
        raise OffloadError(
            f"cannot use {folder} for offload: {error.strerror or error}. Free the disk or name another folder"
        ) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        path.unlink(missing_ok=True)


def reserve(path: Path, old: int, size: int, name: str) -> None:
    """Make the file of `old` bytes one of `size` bytes whose blocks are its own, so that later writes have room.

    Raises OffloadError, and leaves the file as it was, when the disk has no room.
    """
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
            os.truncate(descriptor, size)  # this file system promises nothing; a full disk will show in the writes
    except OSError as error:
        if descriptor >= 0:
            os.truncate(descriptor, old)
            if old == 0:
                path.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise OffloadError(f"cannot make {path} for {name!r}: {error.strerror or error}") from error
        raise OffloadError(
            f"no room for {name!r} in {path.parent}: {size - old:,} bytes are needed, {free_space(path.parent)} "
            f"({error.strerror or error}). Free the disk, name another folder, use more ranks, or keep part of the "
            f"state in CPU memory (ratio)"
        ) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def free_space(folder: Path) -> str:
    """How much this user may still write there, in words."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return f"the disk cannot be asked for free space ({error.strerror or error})"
    return f"{status.f_bavail * status.f_frsize:,} bytes are free"
