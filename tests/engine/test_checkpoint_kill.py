"""kill -9 at every file operation of a save or deletion: what was there still loads, and the next save cleans up.

A second process forks once for each operation; the fork kills itself just before it. Python's audit events tell of the
operations, so that none is forgotten when the code changes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch

from megazero.engine.checkpoint import latest_iteration, load, retain, save
from tests.engine.checkpoint_pieces import assert_equal, logical_state, single, whole_pieces, zeros_like
from tests.harness import ROOT, rank_environment

SCENARIOS = ("first save", "next save", "same step", "deletion")
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.fsync"}


def save_step(store: Path, iteration: int, shift: float) -> None:
    state = logical_state(shift)
    save(
        store, iteration, {"weights": whole_pieces(state), "optimizer": whole_pieces(state)}, {"s": shift}, "", single()
    )


def loaded_shift(store: Path, iteration: int | None = None) -> float:
    """Load all of a checkpoint, check that it is of one save, and say of which."""
    target, optimizer = zeros_like(logical_state()), zeros_like(logical_state())
    state = load(store, iteration, {"weights": whole_pieces(target), "optimizer": whole_pieces(optimizer)}, single())
    shift = float(state["s"])
    assert_equal(target, logical_state(shift))
    assert_equal(optimizer, logical_state(shift))
    return shift


def die_at(number: int) -> None:
    """Kill this process just before its number-th file operation."""
    seen = 0

    def count(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda handle: count("os.fsync", ())  # has no audit event of its own; kill -9 loses no page cache
    sys.addaudithook(count)


def run_scenario(name: str, folder: Path) -> None:
    """Kill one operation after the other until one run survives; check the folder after each."""
    template = folder / "template"
    template.mkdir(parents=True)
    if name != "first save":
        save_step(template, 1, 1.0)
        save_step(template, 2, 2.0)
    number, killed = 0, True
    while killed:
        number += 1
        store = folder / f"run{number}"
        shutil.copytree(template, store)
        child = os.fork()
        if child == 0:
            die_at(number)
            if name == "deletion":
                retain(store, 1)
            else:
                save_step(store, {"first save": 1, "next save": 3, "same step": 2}[name], 9.0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        assert killed or os.waitstatus_to_exitcode(status) == 0, f"the save itself failed at operation {number}"
        check(name, store, killed)
        shutil.rmtree(store)
    assert number > 5, f"only {number} operations were seen"
    print(f"{name}: killed at {number - 1} operations")


def check(name: str, store: Path, killed: bool) -> None:
    latest = latest_iteration(store)
    if latest is None:
        assert killed
        assert name == "first save"
    else:
        shift = loaded_shift(store)
        before, after = {
            "first save": (None, (1, 9.0)),
            "next save": ((2, 2.0), (3, 9.0)),
            "same step": ((2, 2.0), (2, 9.0)),
            "deletion": ((2, 2.0), (2, 2.0)),
        }[name]
        assert (latest, shift) in ((before, after) if killed else (after,))
    if name in ("next save", "same step"):
        assert loaded_shift(store, 1) == 1.0
    save_step(store, 5, 5.0)
    assert loaded_shift(store) == 5.0
    assert all(p.name == "latest" or p.name.startswith("step_") for p in store.iterdir()), list(store.iterdir())


def test_killed_at_every_operation(tmp_path: Path) -> None:
    script = "import sys; from tests.engine import test_checkpoint_kill as t; t.main(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert all(f"{name}: killed at" in done.stdout for name in SCENARIOS)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # for speed: it is a kill, not a power cut, that is tried here
    for name in SCENARIOS:
        run_scenario(name, Path(folder) / name.replace(" ", "_"))
