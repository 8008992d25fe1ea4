"""The folder of an NvmeStore: which ones serve, and that nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megazero.base.errors import ConfigError, OffloadError
from megazero.zero import folder as folder_module
from megazero.zero.nvme import NvmeStore


def test_folders_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nvme_path \(--offload-optimizer-path\) .*/none cannot be found.*mkdir -p"):
        NvmeStore(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"offload_param.nvme_path .*/file is a file; name a folder"):
        NvmeStore(tmp_path / "file", setting="offload_param.nvme_path")
    with pytest.raises(ConfigError, match=r"/proc cannot be written to \(.*name a folder that this user owns"):
        NvmeStore("/proc")


def test_the_probe_decides_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(number: int) -> Callable[..., int]:
        real = os.open

        def opened(path: object, flags: int, *rest: object, **named: object) -> int:
            if flags & os.O_DIRECT:
                raise OSError(number, os.strerror(number))
            return real(path, flags, *rest, **named)  # type: ignore[call-overload, no-any-return]

        return opened

    monkeypatch.setattr(folder_module.os, "open", refusing(errno.EINVAL))
    assert not folder_module.allows_direct_io(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(folder_module.os, "open", refusing(errno.ENOSPC))
    with pytest.raises(OffloadError, match=r"cannot use .* for offload: No space left.*name another folder"):
        NvmeStore(tmp_path)
    assert not list(tmp_path.iterdir())


# what is left behind


def test_close_waits_and_removes_everything(tmp_path: Path) -> None:
    store = NvmeStore(tmp_path)
    transfers = [store.write(str(i), torch.full((300_000,), float(i))) for i in range(5)]
    assert [path.name[:17] for path in tmp_path.iterdir()] == ["megazero-offload-"]
    store.close()
    assert all(transfer.done for transfer in transfers)
    assert not list(tmp_path.iterdir())
    store.close()
    with pytest.raises(AssertionError, match="closed"):
        store.write("a", torch.zeros(4))


def test_a_forgotten_store_is_collected(tmp_path: Path) -> None:
    store = NvmeStore(tmp_path)
    store.write("a", torch.zeros(10_000)).wait()
    del store
    deadline = time.monotonic() + 10
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert not list(tmp_path.iterdir())


CHILD = """
import os, sys, time, torch
from megazero.zero.nvme import NvmeStore
store = NvmeStore(sys.argv[1])
transfer = store.write("a", torch.zeros(3_000_000))
if sys.argv[2] == "fork" and os.fork() == 0:
    sys.exit()
if sys.argv[2] == "fork":
    os.wait()
    transfer.wait()
    store.read("a", torch.zeros(3_000_000)).wait()
print("ready", flush=True)
if sys.argv[2] == "stay":
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["leave", "fork"])
def test_a_process_leaves_nothing(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "ready"), done.stderr
    assert not list(tmp_path.iterdir())


def test_the_next_start_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / "megazero-offload-notes").mkdir()  # looks alike, but is somebody's own
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), "stay"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    theirs = {path.name for path in tmp_path.iterdir()}
    assert len(theirs) == 2
    NvmeStore(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == theirs, "a living process lost its folder"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    NvmeStore(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["megazero-offload-notes"]
